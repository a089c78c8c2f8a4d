{{/*
Pod of a KServe predictor: the engine as kserve-container, the gateway as transformer-container. They talk over the
loopback interface without TLS; KServe's ingress or a mesh encrypts what comes from outside. Both are told to stop at
the same time: the engine waits until the gateway takes no more requests, and then as long as its answers may take.
*/}}
{{- define "steersman.gateway.predictor" -}}
{{- $engine := include "steersman.policy.parts" . | fromYaml -}}
{{- $engine = omit $engine "tls" "artifacts" "probe" "ports" "args" | merge (dict
      "root" . "values" .Values.policy "image" .Values.images.gpu "containerName" "kserve-container"
      "args" (list "--config" "/etc/steersman/config.yaml" "--set" "host=127.0.0.1" "--set" "model=/mnt/models"
              "--set" "metricsPort=null" "--set" "tls=null"
              "--set" (printf "drainSeconds=%d" (int .Values.gateway.drainSeconds)))) -}}
{{- $front := include "steersman.gateway.parts" . | fromYaml -}}
{{- $app := dict "name" "STEERSMAN_DEPLOYMENT" "valueFrom" (dict "fieldRef" (dict "fieldPath" "metadata.labels['app']")) -}}
{{- $gateway := omit $front "tls" "env" "args" | merge (dict
      "root" . "values" .Values.gateway "image" .Values.images.core "containerName" "transformer-container"
      "env" (prepend $front.env $app)
      "args" (concat $front.args (list "--set" "deployment=$(STEERSMAN_DEPLOYMENT)"))) -}}
{{- $pod := include "steersman.podTemplate" $engine | fromYaml -}}
{{- $_ := set (first $pod.spec.containers) "lifecycle" (dict "preStop" (dict "sleep" (dict "seconds" 10))) -}}
{{- $container := include "steersman.container" $gateway | fromYaml -}}
{{- range $container.volumeMounts -}}
{{- if eq .name "config" -}}{{- $_ := set . "name" "gateway-config" -}}{{- end -}}
{{- end -}}
{{- $volumes := append $pod.spec.volumes (dict "name" "gateway-config" "configMap" (dict "name" $gateway.config)) -}}
{{- $_ := set $pod.spec "volumes" (concat $volumes (default list $gateway.volumes)) -}}
{{- $_ := set $pod.spec "containers" (append $pod.spec.containers $container) -}}
{{- toYaml $pod -}}
{{- end -}}
