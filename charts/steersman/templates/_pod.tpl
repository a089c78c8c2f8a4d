{{/*
Blocks that all pods share: Pod Security "restricted", a read-only root file system, volumes, scheduling, probes.
Every block takes a dict with root, component and values (the component's block of values).
*/}}

{{/* Metadata of a pod template; dict also checksum, and shared: false for pods of runs. */}}
{{- define "steersman.podMetadata" -}}
labels:
  {{- if eq .shared false }}
  {{- include "steersman.componentLabels" . | nindent 2 }}
  {{- else }}
  {{- include "steersman.selectorLabels" . | nindent 2 }}
  {{- end }}
  {{- with merge (dict) .values.podLabels .root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ .component }}
  {{- with .checksum }}
  checksum/config: {{ . }}
  {{- end }}
  {{- with merge (dict) .values.podAnnotations .root.Values.commonAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Identity of a pod: account, rights, who it is on the node. dict also token: it may ask the API server. */}}
{{- define "steersman.podIdentity" -}}
serviceAccountName: {{ include "steersman.name" . }}
automountServiceAccountToken: {{ default false .token }}
enableServiceLinks: false
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
securityContext:
  {{- include "steersman.podSecurity" .root | nindent 2 }}
{{- end -}}

{{/* Uids and groups that are null are left to the cluster, as OpenShift wants it. */}}
{{- define "steersman.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.security }}
{{- if not (kindIs "invalid" .runAsUser) }}
runAsUser: {{ int64 .runAsUser }}
{{- end }}
{{- if not (kindIs "invalid" .runAsGroup) }}
runAsGroup: {{ int64 .runAsGroup }}
{{- end }}
{{- if not (kindIs "invalid" .fsGroup) }}
fsGroup: {{ int64 .fsGroup }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
{{- with .supplementalGroups }}
supplementalGroups: {{ toJson . }}
{{- end }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Where a pod may go, and with which credentials its images come. */}}
{{- define "steersman.scheduling" -}}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "steersman.spread" -}}
{{- with .values.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - maxSkew: {{ .maxSkew }}
    topologyKey: {{ .topologyKey }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "steersman.componentLabels" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Image and rights of a container; dict root, image. */}}
{{- define "steersman.containerImage" -}}
image: {{ include "steersman.image" . }}
imagePullPolicy: {{ .image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{/* Variables of every container; dict also cache: it has the model cache. */}}
{{- define "steersman.env" -}}
- name: HOME
  value: {{ ternary "/cache/home" "/tmp/home" (default false .cache) }}
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
{{- if .root.Values.airGapped }}
- name: HF_HUB_OFFLINE
  value: "1"
- name: VLLM_NO_USAGE_STATS
  value: "1"
{{- end }}
{{- with .values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Requests and limits; GPUs go into both. dict root, values. */}}
{{- define "steersman.resources" -}}
{{- $gpus := dict -}}
{{- if .values.gpus -}}
{{- $gpus = dict .root.Values.gpuResource (int .values.gpus) -}}
{{- end -}}
requests:
  {{- toYaml (merge (dict) $gpus (default dict .values.resources.requests)) | nindent 2 }}
limits:
  {{- toYaml (merge (dict) $gpus (default dict .values.resources.limits)) | nindent 2 }}
{{- end -}}

{{/* Mounts of every container; dict also config (a volume's name; none: no configuration), cache, artifacts (ro, rw). */}}
{{- define "steersman.mounts" -}}
- name: tmp
  mountPath: /tmp
{{- if .cache }}
- name: cache
  mountPath: /cache
- name: shm
  mountPath: /dev/shm
{{- end }}
{{- with .config }}
- name: {{ . }}
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
{{- if and .tls (include "steersman.tlsSecret" .root) }}
- name: tls
  mountPath: /etc/steersman/tls
  readOnly: true
{{- end }}
{{- with concat .root.Values.extraVolumeMounts .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Volumes for these mounts; config is the ConfigMap's name. */}}
{{- define "steersman.volumes" -}}
- name: tmp
  emptyDir: {}
{{- if .cache }}
- name: cache
  {{- if eq .values.modelCache.kind "claim" }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-cache" (include "steersman.name" .)) .values.modelCache.existingClaim }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .values.modelCache.size }}
  {{- end }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .values.sharedMemory }}
{{- end }}
{{- with .config }}
- name: config
  configMap:
    name: {{ . }}
{{- end }}
{{- if .artifacts }}
- name: artifacts
  persistentVolumeClaim:
    claimName: {{ include "steersman.artifactsClaim" .root }}
{{- end }}
{{- if and .tls (include "steersman.tlsSecret" .root) }}
- name: tls
  secret:
    secretName: {{ include "steersman.tlsSecret" .root }}
    defaultMode: 0440
{{- end }}
{{- with concat .root.Values.extraVolumes .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
Startup waits for the model, readiness follows health, liveness only asks whether the process answers. dict root,
values, port, service (full gRPC name), anyStart (the process is up before it is ready). The kubelet speaks gRPC without certificates; with TLS the image's client asks.
*/}}
{{- define "steersman.grpcProbes" -}}
{{- $tls := include "steersman.tlsSecret" .root -}}
startupProbe:
  {{- if $tls }}
  exec:
    command: [python, -m, steersman.rpc.probe, "localhost:{{ .port }}", --tls, /etc/steersman/tls{{ if .anyStart }}, --live{{ end }}]
  {{- else }}
  grpc:
    port: {{ .port }}
    service: {{ .service }}
  {{- end }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (int .values.startSeconds) 10 }}
readinessProbe:
  {{- if $tls }}
  exec:
    command: [python, -m, steersman.rpc.probe, "localhost:{{ .port }}", --tls, /etc/steersman/tls]
  {{- else }}
  grpc:
    port: {{ .port }}
    service: {{ .service }}
  {{- end }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  {{- if $tls }}
  exec:
    command: [python, -m, steersman.rpc.probe, "localhost:{{ .port }}", --tls, /etc/steersman/tls, --live]
  {{- else }}
  grpc:
    port: {{ .port }}
  {{- end }}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- end -}}

{{/* The same over HTTP; dict values, port (a name). The process is up before it is ready. */}}
{{- define "steersman.httpProbes" -}}
startupProbe:
  httpGet:
    path: /healthz
    port: {{ .port }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (int .values.startSeconds) 10 }}
readinessProbe:
  httpGet:
    path: /readyz
    port: {{ .port }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  httpGet:
    path: /healthz
    port: {{ .port }}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- end -}}

{{/* Certificates in a service's configuration, and in that of its clients. */}}
{{- define "steersman.tlsServer" -}}
{{- $tls := dict "cert" "/etc/steersman/tls/tls.crt" "key" "/etc/steersman/tls/tls.key" -}}
{{- if .Values.tls.clientCa -}}
{{- $_ := set $tls "clientCa" "/etc/steersman/tls/ca.crt" -}}
{{- end -}}
{{- toJson $tls -}}
{{- end -}}
{{- define "steersman.tlsClient" -}}
{{- dict "ca" "/etc/steersman/tls/ca.crt" "cert" "/etc/steersman/tls/tls.crt" "key" "/etc/steersman/tls/tls.key" | toJson -}}
{{- end -}}
