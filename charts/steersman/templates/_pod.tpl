{{/*
The shape that all pods share: Pod Security "restricted", read-only root file system, volumes, scheduling.

dict:
  root       top context
  component  policy, reward, reference, gateway, controller or trainer
  values     the component's block of values
  image      one of .Values.images
  command    list
  args       list
  ports      list of dicts: name, port; the first is the main one
  probe      dict: port, service (gRPC health) or http (path and port); none: no probes
  env        list of further variables
  mounts     list of further mounts
  volumes    list of further volumes
  config     name of a ConfigMap that is mounted at /etc/steersman; none: none
  artifacts  "ro" or "rw": mounts the artifacts claim; none: none
  cache      true: mounts the model cache
  pool       false: leaves the pool label to the controller
  token      true: mounts a token of the API server
  tls        secret with certificates; none: plain text
*/}}
{{- define "steersman.podTemplate" -}}
{{- $root := .root -}}
{{- $values := .values -}}
{{- $name := include "steersman.name" . -}}
metadata:
  labels:
    {{- if eq .pool false }}
    {{- include "steersman.componentLabels" . | nindent 4 }}
    {{- else }}
    {{- include "steersman.selectorLabels" . | nindent 4 }}
    {{- end }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: {{ .component }}
    {{- with .checksum }}
    checksum/config: {{ . }}
    {{- end }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ $name }}
  automountServiceAccountToken: {{ default false .token }}
  enableServiceLinks: false
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add (int $values.drainSeconds) 15 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with $values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.topologySpread }}
  topologySpreadConstraints:
    {{- range . }}
    - maxSkew: {{ .maxSkew }}
      topologyKey: {{ .topologyKey }}
      whenUnsatisfiable: {{ .whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "steersman.componentLabels" $ | nindent 10 }}
    {{- end }}
  {{- end }}
  containers:
    - {{- include "steersman.container" . | nindent 6 }}
  volumes:
    {{- include "steersman.volumes" . | nindent 4 }}
{{- end -}}

{{/* The main container of the shape above; the same dict. */}}
{{- define "steersman.container" -}}
{{- $root := .root -}}
{{- $values := .values -}}
name: {{ default .component .containerName }}
image: {{ include "steersman.image" (dict "root" $root "image" .image) }}
imagePullPolicy: {{ .image.pullPolicy }}
{{- with .command }}
command:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .args }}
args:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
env:
  - name: HOME
    value: {{ if .cache }}/cache/home{{ else }}/tmp/home{{ end }}
  - name: TMPDIR
    value: /tmp
  {{- if .cache }}
  - name: HF_HOME
    value: /cache/huggingface
  - name: TORCHINDUCTOR_CACHE_DIR
    value: /cache/inductor
  - name: TRITON_CACHE_DIR
    value: /cache/triton
  - name: VLLM_CACHE_ROOT
    value: /cache/vllm
  {{- end }}
  {{- if $root.Values.airGapped }}
  - name: HF_HUB_OFFLINE
    value: "1"
  - name: VLLM_NO_USAGE_STATS
    value: "1"
  {{- end }}
  {{- with .env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with $values.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $values.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .ports }}
ports:
  {{- range . }}
  - name: {{ .name }}
    containerPort: {{ .port }}
    protocol: TCP
  {{- end }}
{{- end }}
resources:
  {{- include "steersman.resources" $values | nindent 2 }}
{{- with .probe }}
{{ include "steersman.probes" (dict "tls" $.tls "values" $values "probe" .) }}
lifecycle:
  preStop:
    sleep:
      seconds: 5
{{- end }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  {{- if .cache }}
  - name: cache
    mountPath: /cache
  - name: shm
    mountPath: /dev/shm
  {{- end }}
  {{- if .config }}
  - name: config
    mountPath: /etc/steersman/config.yaml
    subPath: config.yaml
    readOnly: true
  {{- end }}
  {{- if .artifacts }}
  - name: artifacts
    mountPath: /artifacts
    {{- if eq .artifacts "ro" }}
    readOnly: true
    {{- end }}
  {{- end }}
  {{- if .tls }}
  - name: tls
    mountPath: /etc/steersman/tls
    readOnly: true
  {{- end }}
  {{- with .mounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "steersman.volumes" -}}
{{- $root := .root -}}
{{- $values := .values -}}
- name: tmp
  emptyDir: {}
{{- if .cache }}
- name: cache
  {{- if eq $values.modelCache.kind "claim" }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-cache" (include "steersman.name" .)) $values.modelCache.existingClaim }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ $values.modelCache.size }}
  {{- end }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ $values.sharedMemory }}
{{- end }}
{{- with .config }}
- name: config
  configMap:
    name: {{ . }}
{{- end }}
{{- if .artifacts }}
- name: artifacts
  persistentVolumeClaim:
    claimName: {{ include "steersman.artifactsClaim" $root }}
{{- end }}
{{- if .tls }}
- name: tls
  secret:
    secretName: {{ .tls }}
    defaultMode: 0440
{{- end }}
{{- with .volumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Requests and limits; GPUs go into both. */}}
{{- define "steersman.resources" -}}
{{- $requests := deepCopy (default dict .resources.requests) -}}
{{- $limits := deepCopy (default dict .resources.limits) -}}
{{- if .gpus -}}
{{- $_ := set $requests "nvidia.com/gpu" (int .gpus) -}}
{{- $_ := set $limits "nvidia.com/gpu" (int .gpus) -}}
{{- end -}}
{{- toYaml (dict "requests" $requests "limits" $limits) -}}
{{- end -}}

{{/*
Startup waits for the model (of the gateway: for the process), readiness follows health, liveness only asks whether
the process answers.
*/}}
{{- define "steersman.probes" -}}
startupProbe:
  {{- include "steersman.probe" (dict "tls" .tls "probe" .probe "live" (hasKey .probe "http")) | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (int .values.startSeconds) 10 }}
readinessProbe:
  {{- include "steersman.probe" (dict "tls" .tls "probe" .probe "live" false) | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  {{- include "steersman.probe" (dict "tls" .tls "probe" .probe "live" true) | nindent 2 }}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- end -}}

{{/* The kubelet speaks gRPC and HTTP without client certificates; with TLS the image's own client asks. */}}
{{- define "steersman.probe" -}}
{{- if .tls -}}
exec:
  command: [python, -m, steersman.rpc.probe, "localhost:{{ .probe.port }}", --tls, /etc/steersman/tls{{ if .live }}, --live{{ end }}]
{{- else if .probe.http -}}
httpGet:
  path: {{ ternary .probe.http.live .probe.http.ready .live }}
  port: {{ .probe.http.port }}
{{- else -}}
grpc:
  port: {{ .probe.port }}
  {{- if not .live }}
  service: {{ .probe.service }}
  {{- end }}
{{- end -}}
{{- end -}}
