{{- /* The RayCluster of this job alone, empty if it has none. */ -}}
{{- define "lungseg-job.ownCluster" -}}
{{- with .Values.ownCluster.rayCluster -}}
{{- $cluster := fromYaml . -}}
{{- if or (ne (get $cluster "kind") "RayCluster") (not (hasKey $cluster "spec")) -}}
{{- fail "ownCluster.rayCluster must be a whole RayCluster: --set-file ownCluster.rayCluster=FILE, where FILE is what `helm template RELEASE helm/lungseg --show-only templates/raycluster.yaml` prints" -}}
{{- end -}}
{{- toYaml $cluster -}}
{{- end -}}
{{- end -}}

{{- /* Its spec as a RayJob takes it. KubeRay refuses an upgradeStrategy there, and makes up the cluster's name: what
       tells its pods from others of the release is the label `lungseg/job`. */ -}}
{{- define "lungseg-job.ownSpec" -}}
{{- $spec := omit (include "lungseg-job.ownCluster" . | fromYaml).spec "upgradeStrategy" -}}
{{- range prepend $spec.workerGroupSpecs $spec.headGroupSpec -}}
{{- $_ := set .template.metadata "labels" (merge (dict "lungseg/job" $.Release.Name) .template.metadata.labels $.Values.commonLabels) -}}
{{- end -}}
{{- toYaml $spec -}}
{{- end -}}

{{- /* GPUs that no group of the cluster has are refused, where the cluster can be seen: the job's own, or the one in the
       namespace (`helm template` sees none). */ -}}
{{- define "lungseg-job.gpusExist" -}}
{{- $cluster := include "lungseg-job.ownCluster" . | fromYaml -}}
{{- if not $cluster -}}
{{- $cluster = lookup "ray.io/v1" "RayCluster" .Release.Namespace .Values.cluster | default dict -}}
{{- end -}}
{{- $asked := dig "train" dict .Values.settings -}}
{{- $gpus := $asked.gpus_per_worker | default 0 | int -}}
{{- if and $cluster $gpus -}}
{{- $most := 0 -}}
{{- range dig "spec" "workerGroupSpecs" list $cluster -}}
{{- $limits := (index .template.spec.containers 0).resources.limits -}}
{{- $has := dig "num-gpus" (dig "nvidia.com/gpu" 0 $limits) (.rayStartParams | default dict) -}}
{{- $most = div (int $has) $gpus | mul (int .maxReplicas) | add $most -}}
{{- end -}}
{{- if lt (int $most) ($asked.workers | default 1 | int) -}}
{{- fail (printf "settings.train asks for %d workers of %d GPUs each, and the cluster's groups could hold %d: lower settings.train.workers or gpus_per_worker, or give the cluster a group with gpus" ($asked.workers | default 1 | int) $gpus (int $most)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* train.workers and its GPUs against train.global_batch, where settings name both. */ -}}
{{- define "lungseg-job.divides" -}}
{{- $asked := dig "train" dict .Values.settings -}}
{{- $replicas := mul ($asked.workers | default 1) ($asked.gpus_per_worker | default 1) -}}
{{- if and $asked.global_batch (mod (int $asked.global_batch) $replicas) -}}
{{- fail (printf "settings.train.global_batch=%d is no multiple of %d workers x GPUs: each trains on an equal share" (int $asked.global_batch) $replicas) -}}
{{- end -}}
{{- end -}}

{{- /* A RayJob whose pods miss their ServiceAccount stays Initializing for ever. Every namespace has the account
       `default`: where that is not seen, nothing is. */ -}}
{{- define "lungseg-job.accountExists" -}}
{{- $name := (include "lungseg-job.ownCluster" . | fromYaml).spec.headGroupSpec.template.spec.serviceAccountName -}}
{{- if and (lookup "v1" "ServiceAccount" .Release.Namespace "default") (not (lookup "v1" "ServiceAccount" .Release.Namespace $name)) -}}
{{- fail (printf "ownCluster.rayCluster is of release %s, which is not here: helm install %s helm/lungseg -n %s --set standingCluster=false, with the same values" $name $name .Release.Namespace) -}}
{{- end -}}
{{- end -}}
