{{- define "lungseg.name" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$" .Release.Name) -}}
{{- fail (printf "release name %q: KubeRay takes a lower-case letter, then letters, digits and dashes, 47 at most" .Release.Name) -}}
{{- end -}}
{{- .Release.Name -}}
{{- end -}}

{{- define "lungseg.labels" -}}
app.kubernetes.io/name: lungseg
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "lungseg.storeSelector" -}}
app.kubernetes.io/name: lungseg-store
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "lungseg.storeSecret" -}}
{{- if .Values.objectStore.bundled.enabled -}}
{{- include "lungseg.name" . }}-store
{{- else -}}
{{- .Values.objectStore.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "lungseg.storeEndpoint" -}}
{{- if .Values.objectStore.bundled.enabled -}}
http://{{ include "lungseg.name" . }}-store.{{ .Release.Namespace }}.svc:8333
{{- else -}}
{{- .Values.objectStore.endpoint -}}
{{- end -}}
{{- end -}}

{{- define "lungseg.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "lungseg.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "lungseg.env" -}}
- name: LUNGSEG_STORE
  value: {{ .Values.objectStore.uri | quote }}
- name: AWS_REGION
  value: {{ .Values.objectStore.region | quote }}
- name: AWS_DEFAULT_REGION
  value: {{ .Values.objectStore.region | quote }}
{{- with include "lungseg.storeEndpoint" . }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with $secret := include "lungseg.storeSecret" . }}
{{- range $key := list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ $key }}
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ $key }}
{{- end }}
{{- end }}
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
{{- range .Values.extraEnv }}
{{- if and .value (regexMatch "(?i)(secret|token|password|credential|access_key)" .name) }}
{{- fail (printf "extraEnv %s: a credential must come from a Secret (valueFrom.secretKeyRef), not from values" .name) }}
{{- end }}
- {{ toYaml . | nindent 2 | trim }}
{{- end }}
{{- end -}}

{{- /* Pod template of the head and of a worker group: (dict "root" $ "role" "head"|"worker" "group" <its values>). */ -}}
{{- define "lungseg.podTemplate" -}}
{{- $root := .root -}}
{{- $resources := dict "cpu" .group.cpu "memory" .group.memory -}}
{{- with .group.gpus }}{{ $_ := set $resources "nvidia.com/gpu" . }}{{ end -}}
metadata:
  labels:
    app.kubernetes.io/name: lungseg
    app.kubernetes.io/instance: {{ $root.Release.Name }}
    app.kubernetes.io/component: {{ .role }}
spec:
  serviceAccountName: {{ include "lungseg.name" $root }}
  # Of all containers only Ray's autoscaler, a sidecar of the head, talks to Kubernetes.
  automountServiceAccountToken: {{ and (eq .role "head") $root.Values.autoscaling.enabled }}
  terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
  securityContext:
    {{- include "lungseg.podSecurity" $root | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- if eq .role "worker" }}
  affinity:
    podAntiAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        - topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              ray.io/cluster: {{ include "lungseg.name" $root }}
              ray.io/node-type: worker
  {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ .role }}
      image: {{ $root.Values.image.repository }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "lungseg.containerSecurity" $root | nindent 8 }}
      ports:
        {{- if eq .role "head" }}
        - { name: gcs-server, containerPort: 6379 }
        - { name: dashboard, containerPort: 8265 }
        {{- if $root.Values.metrics.enabled }}
        - { name: training, containerPort: {{ $root.Values.metrics.port }} }
        {{- end }}
        {{- end }}
        - { name: metrics, containerPort: 8080 }
      env:
        {{- include "lungseg.env" $root | nindent 8 }}
      resources:
        requests: {{ toJson $resources }}
        limits: {{ toJson $resources }}
      volumeMounts:
        - { name: tmp, mountPath: /tmp }
        - { name: home, mountPath: /home/lungseg }
        - { name: shared-memory, mountPath: /dev/shm }
        {{- if $root.Values.inputs.existingClaim }}
        - { name: inputs, mountPath: {{ $root.Values.inputs.mountPath }}, readOnly: true }
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {{ with .group.scratch }}{ sizeLimit: {{ . }} }{{ else }}{}{{ end }}
    - name: home
      emptyDir: {}
    # Ray's object store and NCCL; counts as the pod's memory, so the pod's limit bounds it.
    - name: shared-memory
      emptyDir: { medium: Memory, sizeLimit: {{ .group.memory }} }
    {{- with $root.Values.inputs.existingClaim }}
    - name: inputs
      persistentVolumeClaim: { claimName: {{ . }}, readOnly: true }
    {{- end }}
{{- end -}}
