{{- define "lungseg-job.name" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$" .Release.Name) -}}
{{- fail (printf "release name %q: KubeRay takes a lower-case letter, then letters, digits and dashes, 47 at most" .Release.Name) -}}
{{- end -}}
{{- .Release.Name -}}
{{- end -}}

{{- define "lungseg-job.labels" -}}
{{- $own := dict
      "app.kubernetes.io/name" "lungseg"
      "app.kubernetes.io/instance" .Release.Name
      "app.kubernetes.io/component" .Values.job
      "app.kubernetes.io/managed-by" .Release.Service
      "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version) -}}
{{- toYaml (merge $own .Values.commonLabels) -}}
{{- end -}}

{{- /* One word of a POSIX shell line, which is what Ray makes of an entry point. */ -}}
{{- define "lungseg-job.word" -}}
{{- if regexMatch "^[A-Za-z0-9_./:=,@%+-]+$" . -}}
{{- . -}}
{{- else -}}
'{{ replace "'" "'\\''" . }}'
{{- end -}}
{{- end -}}

{{- /* " --set a.b=c" for every leaf of (dict "tree" map "prefix" "a."); the values are JSON, hence YAML. */ -}}
{{- define "lungseg-job.settings" -}}
{{- $prefix := .prefix -}}
{{- range $key, $value := .tree -}}
{{- if kindIs "map" $value -}}
{{- include "lungseg-job.settings" (dict "tree" $value "prefix" (printf "%s%s." $prefix $key)) -}}
{{- else }} --set {{ include "lungseg-job.word" (printf "%s%s=%s" $prefix $key (mustToRawJson $value)) }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lungseg-job.entrypoint" -}}
{{- $v := .Values -}}
{{- $trained := has $v.job (list "evaluate" "fit-post") -}}
{{- if and (not $trained) (not $v.data) -}}
{{- fail (printf "job=%s needs the name of the prepared data: --set data=NAME" $v.job) -}}
{{- end -}}
{{- if and (ne $v.job "prepare") (not $v.run) -}}
{{- fail (printf "job=%s needs the name of a run: --set run=NAME" $v.job) -}}
{{- end -}}
{{- $words := list "python" (printf "jobs/%s.py" $v.job) -}}
{{- if eq $v.job "prepare" }}{{ $words = concat $words (list $v.source.kind $v.source.dir) }}{{ end -}}
{{- with $v.store }}{{ $words = concat $words (list "--store" .) }}{{ end -}}
{{- if not $trained }}{{ $words = concat $words (list "--data" $v.data) }}{{ end -}}
{{- if ne $v.job "prepare" }}{{ $words = concat $words (list "--run" $v.run) }}{{ end -}}
{{- if eq $v.job "tune" }}{{ $words = concat $words (list "--trials" (int64 $v.trials | toString)) }}{{ end -}}
{{- if eq $v.job "evaluate" }}{{ $words = concat $words (list "--split" $v.split "--out" $v.out) }}{{ end -}}
{{- with $v.recipe -}}
{{- if $trained -}}
{{- fail (printf "job=%s takes no recipe: it has the run's, of which settings.segment may be changed" $v.job) -}}
{{- end -}}
{{- $words = concat $words (list "--recipe" .) -}}
{{- end -}}
{{- if and $v.resume (has $v.job (list "train" "tune")) }}{{ $words = append $words "--resume" }}{{ end -}}
{{- range $index, $word := $words }}{{ if $index }} {{ end }}{{ include "lungseg-job.word" $word }}{{ end -}}
{{- include "lungseg-job.settings" (dict "tree" $v.settings "prefix" "") -}}
{{- range $v.args }} {{ include "lungseg-job.word" . }}{{ end -}}
{{- end -}}
