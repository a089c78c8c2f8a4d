{{/* Names, labels, images and small shared blocks. Every template takes a dict with `root` (the top context). */}}

{{- define "steersman.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Name of a component: dict root, component. */}}
{{- define "steersman.name" -}}
{{- printf "%s-%s" (include "steersman.fullname" .root) .component -}}
{{- end -}}

{{- define "steersman.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: steersman
{{ include "steersman.componentLabels" . }}
{{- end -}}

{{/* What pods of a component have in common, those that the controller starts for a run included. */}}
{{- define "steersman.componentLabels" -}}
app.kubernetes.io/name: steersman
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* What Deployments and Services of the chart select: the pool keeps a run's own pods out. */}}
{{- define "steersman.selectorLabels" -}}
{{ include "steersman.componentLabels" . }}
steersman.dev/pool: shared
{{- end -}}

{{/* Image reference: dict root, image (one of .Values.images). A digest wins over a tag. */}}
{{- define "steersman.image" -}}
{{- $image := .image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "steersman.artifactsClaim" -}}
{{- default (printf "%s-artifacts" (include "steersman.fullname" .)) .Values.artifacts.existingClaim -}}
{{- end -}}

{{/* Paths of the certificate inside every pod, as the services' configuration wants them. */}}
{{- define "steersman.tlsConfig" -}}
tls:
  cert: /etc/steersman/tls/tls.crt
  key: /etc/steersman/tls/tls.key
  {{- if .Values.tls.clientCa }}
  clientCa: /etc/steersman/tls/ca.crt
  {{- end }}
{{- end -}}
