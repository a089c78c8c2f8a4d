{{/* Configuration file of the controller. */}}
{{- define "steersman.controller.config" -}}
namespaces: {{ include "steersman.namespaces" . }}
templates: /etc/steersman/templates
storage:
  claim: {{ include "steersman.artifactsClaim" . }}
  root: /artifacts
  data: /artifacts/data
{{- if include "steersman.tlsSecret" . }}
runTls: {{ include "steersman.tlsClient" . }}
{{- end }}
{{- with .Values.tls.certManager }}
{{- if .perRun }}
{{- if not .enabled }}
{{- fail "tls.certManager.perRun needs tls.certManager.enabled: its issuer signs the certificates of runs" }}
{{- end }}
runCertificates: {{ pick . "issuerRef" "duration" "renewBefore" | toJson }}
{{- end }}
{{- end }}
runNetwork: {{ and .Values.networkPolicy.enabled .Values.networkPolicy.perRun }}
gpuResource: {{ .Values.gpuResource }}
resyncSeconds: {{ .Values.controller.resyncSeconds }}
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
  durationSeconds: {{ .Values.controller.leaseSeconds }}
host: {{ .Values.listenAddress | quote }}
metricsPort: 9090
healthPort: 8080
{{- end -}}

{{/* What is mounted into it: its configuration and the pod templates of runs. */}}
{{- define "steersman.controller.data" -}}
config.yaml: |
  {{- include "steersman.controller.config" . | nindent 2 }}
trainer.yaml: |
  {{- include "steersman.trainer.pod" . | nindent 2 }}
{{- range $model := include "steersman.models" . | fromJsonArray }}
{{ $model.component }}.yaml: |
  {{- include "steersman.model.pod" (merge (dict "root" $ "values" (index $.Values $model.component) "shared" false) $model) | nindent 2 }}
{{- end }}
{{- end -}}
