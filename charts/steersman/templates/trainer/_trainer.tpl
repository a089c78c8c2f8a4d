{{/* Pod template of a stage; the controller completes it for each Job. */}}
{{- define "steersman.trainer.pod" -}}
{{- $values := .Values.trainer -}}
{{- $context := dict "root" . "component" "trainer" "values" $values "shared" false "cache" true "artifacts" "rw" "tls" true -}}
metadata:
  {{- include "steersman.podMetadata" $context | nindent 2 }}
spec:
  {{- include "steersman.podIdentity" $context | nindent 2 }}
  {{- include "steersman.scheduling" $context | nindent 2 }}
  {{- include "steersman.spread" $context | nindent 2 }}
  terminationGracePeriodSeconds: {{ add (int $values.drainSeconds) 15 }}
  containers:
    - name: trainer
      {{- include "steersman.containerImage" (dict "root" . "image" .Values.images.gpu) | nindent 6 }}
      env:
        {{- include "steersman.env" $context | nindent 8 }}
      {{- with $values.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- include "steersman.resources" $context | nindent 8 }}
      volumeMounts:
        {{- include "steersman.mounts" $context | nindent 8 }}
  volumes:
    {{- include "steersman.volumes" $context | nindent 4 }}
{{- end -}}
