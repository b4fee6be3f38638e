{{- /* The chart's own variables and extraEnv, each name once. */ -}}
{{- define "lungseg.env" -}}
{{- $all := concat (include "lungseg.ownEnv" . | fromYamlArray) .Values.extraEnv -}}
{{- $names := dict -}}
{{- range $all -}}
{{- if hasKey $names .name -}}
{{- fail (printf "extraEnv %s: there already; use the chart's own value for it, or name it once" .name) -}}
{{- end -}}
{{- $_ := set $names .name true -}}
{{- $credential := regexMatch "(?i)(secret|password|passwd|credential|access_?key|api_?key|(^|_)token(_|$))" .name -}}
{{- $path := regexMatch "_(FILE|PATH|DIR)$" .name -}}
{{- if and .value $credential (not $path) -}}
{{- fail (printf "extraEnv %s: a credential must come from a Secret (valueFrom.secretKeyRef), not from values" .name) -}}
{{- end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{- define "lungseg.ownEnv" -}}
- name: LUNGSEG_STORE
  value: {{ include "lungseg.storeUri" . | quote }}
- name: AWS_REGION
  value: {{ .Values.objectStore.region | quote }}
- name: AWS_DEFAULT_REGION
  value: {{ .Values.objectStore.region | quote }}
{{- with include "lungseg.storeEndpoint" . }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with include "lungseg.storeSecret" . }}
{{- include "lungseg.secretKeys" (list . "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY") }}
{{- end }}
{{- with include "lungseg.caseKeySecret" . }}
{{- include "lungseg.secretKeys" (list . "LUNGSEG_CASE_KEY") }}
{{- end }}
{{- if include "lungseg.caVolume" . }}
- name: AWS_CA_BUNDLE
  value: /etc/lungseg/ca/{{ .Values.caBundle.key }}
{{- end }}
{{- include "lungseg.proxyEnv" . }}
- name: LUNGSEG_NODE_GROUPS
  value: {{ include "lungseg.nodeGroups" . | quote }}
- name: RAY_JOB_STOP_SIGNAL
  value: SIGINT
- name: RAY_JOB_STOP_WAIT_TIME_S
  value: {{ .Values.jobStopWaitSeconds | quote }}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- if .Values.metrics.enabled }}
- name: LUNGSEG_METRICS_HOST
  value: 0.0.0.0
- name: LUNGSEG_METRICS_PORT
  value: {{ .Values.metrics.port | quote }}
{{- end }}
{{- end -}}

{{- /* What nodes there are once all have come: a job waits for these, and what they cannot give is refused. */ -}}
{{- define "lungseg.nodeGroups" -}}
{{- $groups := list -}}
{{- range .Values.workers -}}
{{- $most := $.Values.autoscaling.enabled | ternary (.maxReplicas | default .replicas) .replicas -}}
{{- $groups = append $groups (dict "nodes" (int $most) "CPU" (toString .cpu) "GPU" (.gpus | default 0 | int)) -}}
{{- end -}}
{{- toJson $groups -}}
{{- end -}}

{{- /* In capitals only: both spellings would be two variables to keep alike, and what lungseg uses reads these. */ -}}
{{- define "lungseg.proxyEnv" -}}
{{- with .Values.proxy }}
{{- if or .http .https }}
{{- range $name, $value := dict "HTTP_PROXY" .http "HTTPS_PROXY" .https }}
{{- with $value }}
- name: {{ $name }}
  value: {{ . | quote }}
{{- end }}
{{- end }}
- name: NO_PROXY
  value: {{ list "localhost,127.0.0.1,.svc,.cluster.local" .noProxy | compact | join "," | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "lungseg.caVolume" -}}
{{- with .Values.caBundle -}}
{{- if and .configMap .secret -}}
{{- fail "caBundle: either configMap or secret, not both" -}}
{{- end -}}
{{- if .configMap }}
configMap: { name: {{ .configMap }} }
{{- else if .secret }}
secret: { secretName: {{ .secret }} }
{{- end }}
{{- end -}}
{{- end -}}
