{{/* Configuration file of the gateway; dict root. */}}
{{- define "steersman.gateway.config" -}}
{{- $root := .root -}}
{{- $config := dict
      "host" $root.Values.listenAddress
      "port" 8080
      "grpcPort" 8081
      "metricsPort" 9090
      "databaseEnv" "STEERSMAN_DATABASE"
      "drainSeconds" $root.Values.gateway.drainSeconds -}}
{{- if eq $root.Values.gateway.mode "deployment" -}}
{{- $host := printf "%s.%s.svc" (include "steersman.name" (dict "root" $root "component" "policy")) $root.Release.Namespace -}}
{{- $policy := dict "endpoints" (list (printf "dns:///%s:50051" $host)) "split" "/etc/steersman/split/split.yaml" -}}
{{- if include "steersman.tlsSecret" $root -}}
{{- $_ := set $policy "tls" (include "steersman.tlsClient" $root | fromJson | merge (dict "serverName" $host)) -}}
{{- $_ := set $config "tls" (include "steersman.tlsServer" $root | fromJson) -}}
{{- end -}}
{{- $_ := set $config "policy" $policy -}}
{{- end -}}
{{- if $root.Values.gateway.signingSecret.name -}}
{{- $_ := set $config "secretEnv" "STEERSMAN_SIGNING_SECRET" -}}
{{- end -}}
{{- mergeOverwrite $config (deepCopy $root.Values.gateway.config) | toYaml -}}
{{- end -}}

{{/* Variables with what signs. */}}
{{- define "steersman.gateway.signing" -}}
{{- with .Values.gateway.signingSecret -}}
{{- if .name -}}
- name: STEERSMAN_SIGNING_SECRET
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .key }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The database's URL holds a password: it comes by environment, which nobody else on the node reads. */}}
{{- define "steersman.gateway.database" -}}
{{- if eq .Values.database.mode "external" -}}
- name: STEERSMAN_DATABASE
  valueFrom:
    secretKeyRef:
      name: {{ required "database.existingSecret is needed: the secret with the PostgreSQL URL (or set database.mode to sqlite)" .Values.database.existingSecret }}
      key: {{ .Values.database.key }}
{{- else -}}
- name: STEERSMAN_DATABASE
  value: sqlite:////data/steersman.db
{{- end -}}
{{- end -}}
