{{/* The three services that hold a model: ports and gRPC names, as JSON. */}}
{{- define "steersman.models" -}}
[
  {"component": "policy", "port": 50051, "service": "steersman.v1.PolicyService", "from": ["gateway", "trainer", "test"]},
  {"component": "reward", "port": 50052, "service": "steersman.v1.RewardService", "from": ["gateway", "trainer", "test"]},
  {"component": "reference", "port": 50053, "service": "steersman.v1.ReferenceService", "from": ["trainer", "test"]}
]
{{- end -}}

{{/* Configuration file of one of them. */}}
{{- define "steersman.model.config" -}}
{{- $config := dict
      "host" .root.Values.listenAddress
      "cacheDir" "/cache"
      "metricsPort" 9090
      "drainSeconds" .values.drainSeconds -}}
{{- if include "steersman.tlsSecret" .root -}}
{{- $_ := set $config "tls" (include "steersman.tlsServer" .root | fromJson) -}}
{{- end -}}
{{- if and (eq .component "policy") (not .values.acceptWeights) -}}
{{- $_ := set $config "weightsPort" nil -}}
{{- end -}}
{{- mergeOverwrite $config (deepCopy .values.config) | toYaml -}}
{{- end -}}

{{/*
Pod template. dict root, component, values, port, service; shared: false for the pods of a run, which the controller
completes.
*/}}
{{- define "steersman.model.pod" -}}
{{- $root := .root -}}
{{- $values := .values -}}
{{- $weights := and (eq .component "policy") (or (eq .shared false) $values.acceptWeights) -}}
{{- $name := include "steersman.name" . -}}
{{- $checksum := include "steersman.model.config" . | sha256sum | trunc 16 -}}
metadata:
  {{- include "steersman.podMetadata" (merge (dict "checksum" $checksum) .) | nindent 2 }}
spec:
  {{- include "steersman.podIdentity" . | nindent 2 }}
  {{- include "steersman.scheduling" . | nindent 2 }}
  {{- include "steersman.spread" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ add (int $values.drainSeconds) 15 }}
  containers:
    - name: {{ .component }}
      {{- include "steersman.containerImage" (dict "root" $root "image" $root.Values.images.gpu) | nindent 6 }}
      command: [python, -m, services.{{ .component }}]
      args:
        - --config
        - /etc/steersman/config.yaml
        {{- if and $weights (eq .shared false) }}
        - --set
        - weightsPort=50054
        {{- end }}
      env:
        {{- include "steersman.env" (merge (dict "cache" true) .) | nindent 8 }}
      {{- with $values.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - {name: grpc, containerPort: {{ .port }}, protocol: TCP}
        {{- if $weights }}
        - {name: grpc-weights, containerPort: 50054, protocol: TCP}
        {{- end }}
        - {name: metrics, containerPort: 9090, protocol: TCP}
      resources:
        {{- include "steersman.resources" . | nindent 8 }}
      {{- include "steersman.grpcProbes" . | nindent 6 }}
      lifecycle:
        preStop:
          sleep:
            seconds: 5
      volumeMounts:
        {{- include "steersman.mounts" (merge (dict "config" "config" "cache" true "artifacts" "ro" "tls" true) .) | nindent 8 }}
  volumes:
    {{- include "steersman.volumes" (merge (dict "config" $name "cache" true "artifacts" "ro" "tls" true) .) | nindent 4 }}
{{- end -}}
