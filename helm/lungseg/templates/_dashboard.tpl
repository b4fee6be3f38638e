{{- /* files/panels.yaml as Grafana's JSON. */ -}}
{{- define "lungseg.dashboard" -}}
{{- $source := dict "type" "prometheus" "uid" "${source}" -}}
{{- $panels := list -}}
{{- range $number, $panel := .Files.Get "files/panels.yaml" | fromYamlArray -}}
{{- $targets := list -}}
{{- range $panel.lines -}}
{{- $targets = append $targets (dict "datasource" $source "expr" (index . 0) "legendFormat" (index . 1)) -}}
{{- end -}}
{{- $panels = append $panels (dict
      "id" (add 1 $number) "type" "timeseries" "title" $panel.title "datasource" $source "targets" $targets
      "gridPos" (dict "x" (mul 12 (mod $number 2)) "y" (mul 8 (div $number 2)) "w" 12 "h" 8)
      "fieldConfig" (dict "defaults" (dict "unit" ($panel.unit | default "short") "min" 0) "overrides" list)) -}}
{{- end -}}
{{- $variables := list
      (dict "name" "source" "label" "Prometheus" "type" "datasource" "query" "prometheus")
      (dict "name" "run" "label" "Run" "type" "query" "datasource" $source "query" "label_values(lungseg_patches_total, run)"
            "refresh" 2 "includeAll" true "multi" true "current" (dict "text" "All" "value" "$__all")) -}}
{{- mustToRawJson (dict "uid" "lungseg" "title" "lungseg" "schemaVersion" 39 "refresh" "30s" "time" (dict "from" "now-6h" "to" "now")
      "templating" (dict "list" $variables) "panels" $panels) -}}
{{- end -}}
