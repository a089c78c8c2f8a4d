{{/* Pod of the reference service; the controller uses it, too, for the pods of a run. */}}
{{- define "steersman.reference.pod" -}}
{{- include "steersman.podTemplate" (include "steersman.reference.parts" . | fromYaml | merge (dict "root" . "values" .Values.reference "image" .Values.images.gpu)) -}}
{{- end -}}

{{- define "steersman.reference.parts" -}}
component: reference
command: [python, -m, services.reference]
args: [--config, /etc/steersman/config.yaml]
ports: [{name: grpc, port: 50053}, {name: metrics, port: 9090}]
probe: {port: 50053, service: steersman.v1.ReferenceService}
config: {{ include "steersman.name" (dict "root" . "component" "reference") }}
checksum: {{ include "steersman.reference.config" . | sha256sum | trunc 16 }}
artifacts: ro
cache: true
tls: {{ .Values.tls.secretName | quote }}
{{- end -}}

{{- define "steersman.reference.config" -}}
host: 0.0.0.0
cacheDir: /cache
metricsPort: 9090
drainSeconds: {{ .Values.reference.drainSeconds }}
{{- if .Values.tls.secretName }}
{{ include "steersman.tlsConfig" . }}
{{- end }}
{{ toYaml .Values.reference.config }}
{{- end -}}
