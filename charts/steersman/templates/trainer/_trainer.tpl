{{/* Pod of a stage; the controller completes it for each Job. */}}
{{- define "steersman.trainer.pod" -}}
{{- $parts := dict
      "root" . "component" "trainer" "values" .Values.trainer "image" .Values.images.gpu
      "artifacts" "rw" "cache" true "pool" false "tls" .Values.tls.secretName -}}
{{- include "steersman.podTemplate" $parts -}}
{{- end -}}
