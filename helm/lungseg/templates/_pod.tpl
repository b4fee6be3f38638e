{{- /* Request and limit of a Ray pod: (dict "group" <its values>). Ephemeral storage is what /tmp and a cache on the
       node's own disk may hold; sizes are whole Gi. */ -}}
{{- define "lungseg.resources" -}}
{{- $group := .group -}}
{{- $resources := dict "cpu" $group.cpu "memory" $group.memory -}}
{{- with $group.gpus }}{{ $_ := set $resources ($group.gpuResource | default "nvidia.com/gpu") . }}{{ end -}}
{{- $disk := list $group.scratch (dig "cache" "storageClass" "" $group | empty | ternary (dig "cache" "size" "" $group) "") | compact -}}
{{- if $disk -}}
{{- $sum := 0 -}}
{{- range $disk }}{{ $sum = trimSuffix "Gi" . | int | add $sum }}{{ end -}}
{{- $_ := set $resources "ephemeral-storage" (printf "%dGi" $sum) -}}
{{- end -}}
{{- range $bound := list "requests" "limits" }}
{{ $bound }}: {{ toJson $resources }}
{{- end }}
{{- end -}}

{{- /* Where a Ray pod goes: (dict "root" $ "role" "head"|"worker" "group" <its values>). */ -}}
{{- define "lungseg.placement" -}}
{{- $root := .root -}}
{{- $selector := include "lungseg.selector" (list .root .role) | fromYaml -}}
{{- if eq .role "worker" }}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $selector) }}
affinity:
  podAntiAffinity:
    {{- if eq $root.Values.antiAffinity "required" }}
    requiredDuringSchedulingIgnoredDuringExecution:
      - {{ toYaml $term | nindent 8 | trim }}
    {{- else }}
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          {{- toYaml $term | nindent 10 }}
    {{- end }}
{{- end }}
{{- with .group.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  - {{ toYaml (merge (dict) . (dict "labelSelector" (dict "matchLabels" $selector))) | nindent 4 | trim }}
  {{- end }}
{{- end }}
{{- range $field := list "nodeSelector" "tolerations" "priorityClassName" "runtimeClassName" }}
{{- with get $.group $field }}
{{ toYaml (dict $field .) }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "lungseg.podMounts" -}}
- { name: tmp, mountPath: /tmp }
- { name: home, mountPath: /home/lungseg }
- { name: shared-memory, mountPath: /dev/shm }
{{- if dig "cache" "size" "" .group }}
- { name: cache, mountPath: /cache }
{{- end }}
{{- with .root.Values.inputs }}
{{- if .existingClaim }}
- { name: inputs, mountPath: {{ .mountPath }}, readOnly: true }
{{- end }}
{{- end }}
{{- if include "lungseg.caVolume" .root }}
- { name: ca, mountPath: /etc/lungseg/ca, readOnly: true }
{{- end }}
{{- with .root.Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "lungseg.podVolumes" -}}
- name: tmp
  emptyDir: {{ with .group.scratch }}{ sizeLimit: {{ . }} }{{ else }}{}{{ end }}
- name: home
  emptyDir: {}
# Ray's object store and NCCL; counts as the pod's memory, so the pod's limit bounds it.
- name: shared-memory
  emptyDir: { medium: Memory, sizeLimit: {{ .group.memory }} }
{{- with dig "cache" "size" "" .group }}
- name: cache
  {{- if dig "cache" "storageClass" "" $.group }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ $.group.cache.storageClass }}
        resources: { requests: { storage: {{ . }} } }
  {{- else }}
  emptyDir: { sizeLimit: {{ . }} }
  {{- end }}
{{- end }}
{{- with .root.Values.inputs.existingClaim }}
- name: inputs
  persistentVolumeClaim: { claimName: {{ . }}, readOnly: true }
{{- end }}
{{- with include "lungseg.caVolume" .root }}
- name: ca
  {{- . | nindent 2 }}
{{- end }}
{{- with .root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* What `automountServiceAccountToken` would mount in every container, for Ray's autoscaler alone. */ -}}
{{- define "lungseg.tokenVolume" -}}
- name: api-token
  projected:
    sources:
      - serviceAccountToken: { path: token, expirationSeconds: 3607 }
      - configMap: { name: kube-root-ca.crt, items: [{ key: ca.crt, path: ca.crt }] }
      - downwardAPI: { items: [{ path: namespace, fieldRef: { fieldPath: metadata.namespace } }] }
{{- end -}}

{{- /* Pod template of the head and of a worker group: (dict "root" $ "role" "head"|"worker" "group" <its values>). */ -}}
{{- define "lungseg.podTemplate" -}}
{{- $root := .root -}}
metadata:
  {{- include "lungseg.podMetadata" (list $root (include "lungseg.selector" (list $root .role))) | nindent 2 }}
spec:
  serviceAccountName: {{ include "lungseg.name" $root }}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
  securityContext:
    {{- include "lungseg.podSecurity" $root | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- include "lungseg.placement" . | nindent 2 }}
  containers:
    - name: ray-{{ .role }}
      image: {{ include "lungseg.image" $root }}
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
        {{- include "lungseg.resources" . | nindent 8 }}
      volumeMounts:
        {{- include "lungseg.podMounts" . | nindent 8 }}
  volumes:
    {{- include "lungseg.podVolumes" . | nindent 4 }}
    {{- if and (eq .role "head") $root.Values.autoscaling.enabled }}
    {{- include "lungseg.tokenVolume" $root | nindent 4 }}
    {{- end }}
{{- end -}}
