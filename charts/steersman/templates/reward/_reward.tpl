{{/* Pod of the reward service; the controller uses it, too, for the pods of a run. */}}
{{- define "steersman.reward.pod" -}}
{{- include "steersman.podTemplate" (include "steersman.reward.parts" . | fromYaml | merge (dict "root" . "values" .Values.reward "image" .Values.images.gpu)) -}}
{{- end -}}

{{- define "steersman.reward.parts" -}}
component: reward
command: [python, -m, services.reward]
args: [--config, /etc/steersman/config.yaml]
ports: [{name: grpc, port: 50052}, {name: metrics, port: 9090}]
probe: {port: 50052, service: steersman.v1.RewardService}
config: {{ include "steersman.name" (dict "root" . "component" "reward") }}
checksum: {{ include "steersman.reward.config" . | sha256sum | trunc 16 }}
artifacts: ro
cache: true
tls: {{ .Values.tls.secretName | quote }}
{{- end -}}

{{- define "steersman.reward.config" -}}
host: 0.0.0.0
cacheDir: /cache
metricsPort: 9090
drainSeconds: {{ .Values.reward.drainSeconds }}
{{- if .Values.tls.secretName }}
{{ include "steersman.tlsConfig" . }}
{{- end }}
{{ toYaml .Values.reward.config }}
{{- end -}}
