{{- define "lungseg.name" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$" .Release.Name) -}}
{{- fail (printf "release name %q: KubeRay takes a lower-case letter, then letters, digits and dashes, 47 at most" .Release.Name) -}}
{{- end -}}
{{- .Release.Name -}}
{{- end -}}

{{- define "lungseg.labels" -}}
{{- $own := dict
      "app.kubernetes.io/name" "lungseg"
      "app.kubernetes.io/instance" .Release.Name
      "app.kubernetes.io/version" .Chart.AppVersion
      "app.kubernetes.io/managed-by" .Release.Service
      "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version) -}}
{{- toYaml (merge $own .Values.commonLabels) -}}
{{- end -}}

{{- /* What selects Ray's pods of this release, also those of a job's own cluster, whose `ray.io/cluster` KubeRay makes
       up: (list $) or (list $ "worker"). */ -}}
{{- define "lungseg.selector" -}}
app.kubernetes.io/name: lungseg
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- if gt (len .) 1 }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}
{{- end -}}

{{- define "lungseg.storeSelector" -}}
app.kubernetes.io/name: lungseg-store
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* Labels and annotations of a pod: (list $ <its selector>). */ -}}
{{- define "lungseg.podMetadata" -}}
{{- $values := (index . 0).Values -}}
labels:
  {{- toYaml (merge (fromYaml (index . 1)) $values.podLabels $values.commonLabels) | nindent 2 }}
{{- with $values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "lungseg.image" -}}
{{- with .Values.image -}}
{{- .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end -}}

{{- define "lungseg.storeUri" -}}
{{- with .Values.objectStore -}}
{{- if not (or .uri .bundled.enabled) -}}
{{- fail "no store: name a bucket (objectStore.uri=s3://…), or bring one for trials (objectStore.bundled.enabled=true)" -}}
{{- end -}}
{{- .uri | default "s3://lungseg" -}}
{{- end -}}
{{- end -}}

{{- define "lungseg.storeSecret" -}}
{{- with .Values.objectStore -}}
{{- if .bundled.enabled }}{{ .bundled.existingSecret | default (printf "%s-store" $.Release.Name) }}{{ else }}{{ .existingSecret }}{{ end -}}
{{- end -}}
{{- end -}}

{{- define "lungseg.storeEndpoint" -}}
{{- if .Values.objectStore.bundled.enabled -}}
http://{{ include "lungseg.name" . }}-store.{{ .Release.Namespace }}.svc:8333
{{- else -}}
{{- .Values.objectStore.endpoint -}}
{{- end -}}
{{- end -}}

{{- define "lungseg.caseKeySecret" -}}
{{- with .Values.caseKey -}}
{{- if and .generate .existingSecret -}}
{{- fail "caseKey: either existingSecret or generate, not both" -}}
{{- end -}}
{{- if .generate }}{{ $.Release.Name }}-case-key{{ else }}{{ .existingSecret }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* A value of a Secret as it is in the cluster, in base64, else the one given: (list $ <Secret> <key> <new>). */ -}}
{{- define "lungseg.kept" -}}
{{- $there := lookup "v1" "Secret" (index . 0).Release.Namespace (index . 1) | default dict -}}
{{- dig "data" (index . 2) (index . 3 | b64enc) $there -}}
{{- end -}}

{{- /* Pods of a worker group at the start: (list $ <the group's values>). Under the autoscaler those that are there, which
       an upgrade would otherwise set back while they work. */ -}}
{{- define "lungseg.replicas" -}}
{{- $group := index . 1 -}}
{{- $replicas := $group.replicas -}}
{{- with index . 0 -}}
{{- if .Values.autoscaling.enabled -}}
{{- range dig "spec" "workerGroupSpecs" list (lookup "ray.io/v1" "RayCluster" .Release.Namespace .Release.Name | default dict) -}}
{{- if eq .groupName $group.name }}{{ $replicas = min .replicas ($group.maxReplicas | default $group.replicas) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $replicas -}}
{{- end -}}

{{- define "lungseg.podSecurity" -}}
{{- $ours := dict "runAsNonRoot" true "seccompProfile" (dict "type" "RuntimeDefault") -}}
{{- toYaml (merge $ours .Values.podSecurityContext (dict "fsGroupChangePolicy" "OnRootMismatch")) -}}
{{- end -}}

{{- define "lungseg.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "lungseg.secretKeys" -}}
{{- range $key := slice . 1 }}
- name: {{ $key }}
  valueFrom:
    secretKeyRef:
      name: {{ index $ 0 }}
      key: {{ $key }}
{{- end }}
{{- end -}}
