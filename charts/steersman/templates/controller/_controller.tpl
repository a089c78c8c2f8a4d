{{- define "steersman.controller.config" -}}
namespaces: [{{ .Release.Namespace }}]
templates: /etc/steersman/templates
storage:
  claim: {{ include "steersman.artifactsClaim" . }}
  root: /artifacts
  data: /artifacts/data
{{- with .Values.controller.prometheusUrl }}
prometheusUrl: {{ . }}
{{- end }}
{{- with .Values.controller.mlflowUrl }}
mlflowUrl: {{ . }}
{{- end }}
registeredModel: {{ .Values.controller.registeredModel }}
leaderElection:
  lease: {{ include "steersman.name" (dict "root" . "component" "controller") }}
  namespace: {{ .Release.Namespace }}
metricsPort: 9090
healthPort: 8080
{{- end -}}

{{- define "steersman.controller.pod" -}}
{{- $parts := dict
      "root" . "component" "controller" "values" .Values.controller "image" .Values.images.core "token" true
      "command" (list "python" "-m" "services.controller") "args" (list "--config" "/etc/steersman/config.yaml")
      "ports" (list (dict "name" "health" "port" 8080) (dict "name" "metrics" "port" 9090))
      "config" (include "steersman.name" (dict "root" . "component" "controller"))
      "checksum" (include "steersman.controller.data" . | sha256sum | trunc 16)
      "env" (include "steersman.controller.env" . | fromYamlArray)
      "mounts" (list (dict "name" "config" "mountPath" "/etc/steersman/templates" "readOnly" true)) -}}
{{- $pod := include "steersman.podTemplate" $parts | fromYaml -}}
{{- $probe := dict "httpGet" (dict "path" "/healthz" "port" "health") "periodSeconds" 20 "failureThreshold" 6 -}}
{{- $container := set (first $pod.spec.containers) "livenessProbe" $probe -}}
{{- toYaml (set $pod "spec" (set $pod.spec "containers" (list $container))) -}}
{{- end -}}

{{/* The store of the gateways, for feedback during a canary. */}}
{{- define "steersman.controller.env" -}}
{{- if and .Values.gateway.enabled (eq .Values.database.mode "external") .Values.database.existingSecret }}
{{- include "steersman.gateway.env" . }}
{{- else }}
[]
{{- end }}
{{- end -}}

{{- define "steersman.controller.data" -}}
config.yaml: |
  {{- include "steersman.controller.config" . | nindent 2 }}
trainer.yaml: |
  {{- include "steersman.trainer.pod" . | nindent 2 }}
{{- range $component := list "policy" "reward" "reference" }}
{{ $component }}.yaml: |
  {{- include "steersman.podTemplate" (include (printf "steersman.%s.parts" $component) $ | fromYaml | merge (dict "root" $ "values" (index $.Values $component) "image" $.Values.images.gpu "pool" false)) | nindent 2 }}
{{- end }}
{{- end -}}
