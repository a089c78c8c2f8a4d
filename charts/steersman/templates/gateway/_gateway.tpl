{{/* Pod of the gateway as a Deployment. */}}
{{- define "steersman.gateway.pod" -}}
{{- include "steersman.podTemplate" (include "steersman.gateway.parts" . | fromYaml | merge (dict "root" . "values" .Values.gateway "image" .Values.images.core)) -}}
{{- end -}}

{{- define "steersman.gateway.parts" -}}
component: gateway
command: [python, -m, services.gateway]
args: [--config, /etc/steersman/config.yaml, --set, database=$(STEERSMAN_DATABASE)]
ports: [{name: http, port: 8080}, {name: grpc, port: 8081}, {name: metrics, port: 9090}]
probe: {port: 8081, http: {port: http, live: /healthz, ready: /readyz}}
tls: {{ .Values.tls.secretName | quote }}
config: {{ include "steersman.name" (dict "root" . "component" "gateway") }}
checksum: {{ include "steersman.gateway.config" . | sha256sum | trunc 16 }}
env:
  {{- include "steersman.gateway.env" . | nindent 2 }}
{{- if eq .Values.database.mode "sqlite" }}
mounts:
  - {name: database, mountPath: /data}
volumes:
  - name: database
    persistentVolumeClaim:
      claimName: {{ include "steersman.fullname" . }}-database
{{- end }}
{{- end -}}

{{- define "steersman.gateway.env" -}}
{{- if eq .Values.database.mode "external" }}
- name: STEERSMAN_DATABASE
  valueFrom:
    secretKeyRef:
      name: {{ required "database.existingSecret is needed: the secret with the PostgreSQL URL (or set database.mode to sqlite)" .Values.database.existingSecret }}
      key: {{ .Values.database.key }}
{{- else }}
- name: STEERSMAN_DATABASE
  value: sqlite:////data/steersman.db
{{- end }}
{{- end -}}

{{- define "steersman.gateway.config" -}}
host: 0.0.0.0
port: 8080
grpcPort: 8081
metricsPort: 9090
drainSeconds: {{ .Values.gateway.drainSeconds }}
{{- if eq .Values.gateway.mode "deployment" }}
policy:
  endpoints:
    - dns:///{{ include "steersman.name" (dict "root" . "component" "policy") }}.{{ .Release.Namespace }}.svc:50051
  {{- if .Values.tls.secretName }}
  tls:
    ca: /etc/steersman/tls/ca.crt
    cert: /etc/steersman/tls/tls.crt
    key: /etc/steersman/tls/tls.key
  {{- end }}
{{- if .Values.tls.secretName }}
{{ include "steersman.tlsConfig" . }}
{{- end }}
{{- end }}
{{- with .Values.gateway.config }}
{{ toYaml . }}
{{- end }}
{{- end -}}
