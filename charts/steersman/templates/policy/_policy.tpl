{{/* Pod of the policy service; the controller uses it, too, for the pods of a run. */}}
{{- define "steersman.policy.pod" -}}
{{- include "steersman.podTemplate" (include "steersman.policy.parts" . | fromYaml | merge (dict "root" . "values" .Values.policy "image" .Values.images.gpu)) -}}
{{- end -}}

{{- define "steersman.policy.parts" -}}
component: policy
command: [python, -m, services.policy]
args: [--config, /etc/steersman/config.yaml]
ports: [{name: grpc, port: 50051}, {name: grpc-weights, port: 50054}, {name: metrics, port: 9090}]
probe: {port: 50051, service: steersman.v1.PolicyService}
config: {{ include "steersman.name" (dict "root" . "component" "policy") }}
checksum: {{ include "steersman.policy.config" . | sha256sum | trunc 16 }}
artifacts: ro
cache: true
tls: {{ .Values.tls.secretName | quote }}
{{- end -}}

{{- define "steersman.policy.config" -}}
host: 0.0.0.0
cacheDir: /cache
metricsPort: 9090
drainSeconds: {{ .Values.policy.drainSeconds }}
{{- if .Values.tls.secretName }}
{{ include "steersman.tlsConfig" . }}
{{- end }}
{{ toYaml .Values.policy.config }}
{{- end -}}
