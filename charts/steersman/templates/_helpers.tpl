{{/* Names, labels, metadata, images. Every template takes a dict with `root` (the top context). */}}

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
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
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

{{/*
Metadata of an object. dict:
  root, component
  name         another name than the component's
  namespace    another one than the release's
  labels       further labels
  annotations  further annotations; they win over commonAnnotations
*/}}
{{- define "steersman.metadata" -}}
name: {{ default (include "steersman.name" .) .name }}
{{- with .namespace }}
namespace: {{ . }}
{{- end }}
labels:
  {{- include "steersman.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (default dict .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
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

{{/* Secret with the certificate; empty: plain text. */}}
{{- define "steersman.tlsSecret" -}}
{{- if .Values.tls.certManager.enabled -}}
{{- default (printf "%s-tls" (include "steersman.fullname" .)) .Values.tls.secretName -}}
{{- else -}}
{{- .Values.tls.secretName -}}
{{- end -}}
{{- end -}}

{{/* Namespaces whose runs the controller executes, as a JSON list. */}}
{{- define "steersman.namespaces" -}}
{{- default (list .Release.Namespace) .Values.controller.namespaces | toJson -}}
{{- end -}}
