{{/* The objects around a pod template. Every template takes root, component and values. */}}

{{- define "steersman.serviceAccount" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "steersman.name" . }}
  labels:
    {{- include "steersman.labels" . | nindent 4 }}
  {{- with .values.serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end -}}

{{/* dict root, component, values, pod (rendered pod template). */}}
{{- define "steersman.deployment" -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "steersman.name" . }}
  labels:
    {{- include "steersman.labels" . | nindent 4 }}
spec:
  {{- if not .values.autoscaling.kind }}
  replicas: {{ .values.replicas }}
  {{- end }}
  revisionHistoryLimit: 5
  {{- with .values.strategy }}
  strategy:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  selector:
    matchLabels:
      {{- include "steersman.selectorLabels" . | nindent 6 }}
  template:
    {{- .pod | nindent 4 }}
{{- end -}}

{{/* Headless: gRPC clients resolve all pods and balance round-robin. dict also ports; headless false: a virtual IP. */}}
{{- define "steersman.service" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "steersman.name" . }}
  labels:
    {{- include "steersman.labels" . | nindent 4 }}
    steersman.dev/metrics: "true"
  {{- with .values.service.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if eq .headless false }}
  type: {{ .values.service.type }}
  {{- else }}
  clusterIP: None
  {{- end }}
  selector:
    {{- include "steersman.selectorLabels" . | nindent 4 }}
  ports:
    {{- range .ports }}
    - name: {{ .name }}
      port: {{ .port }}
      targetPort: {{ .name }}
      protocol: TCP
      {{- if hasPrefix "grpc" .name }}
      appProtocol: kubernetes.io/h2c
      {{- end }}
    {{- end }}
{{- end -}}

{{- define "steersman.pdb" -}}
{{- if .values.pdb.enabled }}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "steersman.name" . }}
  labels:
    {{- include "steersman.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .values.pdb.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "steersman.selectorLabels" . | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "steersman.autoscaler" -}}
{{- $auto := .values.autoscaling -}}
{{- if eq $auto.kind "hpa" }}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ include "steersman.name" . }}
  labels:
    {{- include "steersman.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ include "steersman.name" . }}
  minReplicas: {{ $auto.minReplicas }}
  maxReplicas: {{ $auto.maxReplicas }}
  metrics:
    - type: Resource
      resource:
        name: cpu
        target:
          type: Utilization
          averageUtilization: {{ $auto.cpuUtilization }}
  behavior:
    scaleDown:
      stabilizationWindowSeconds: 300
{{- else if eq $auto.kind "keda" }}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ include "steersman.name" . }}
  labels:
    {{- include "steersman.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    name: {{ include "steersman.name" . }}
  minReplicaCount: {{ $auto.minReplicas }}
  maxReplicaCount: {{ $auto.maxReplicas }}
  cooldownPeriod: 300
  triggers:
    - type: prometheus
      metadata:
        serverAddress: {{ required "controller.prometheusUrl is needed for autoscaling by KEDA" .root.Values.controller.prometheusUrl }}
        query: {{ .query | quote }}
        threshold: {{ $auto.waitingPerReplica | quote }}
{{- end }}
{{- end -}}

{{- define "steersman.cacheClaim" -}}
{{- if and (eq .values.modelCache.kind "claim") (not .values.modelCache.existingClaim) }}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "steersman.name" . }}-cache
  labels:
    {{- include "steersman.labels" . | nindent 4 }}
spec:
  accessModes: {{ toJson .values.modelCache.accessModes }}
  {{- with .values.modelCache.storageClass }}
  storageClassName: {{ . }}
  {{- end }}
  resources:
    requests:
      storage: {{ .values.modelCache.size }}
{{- end }}
{{- end -}}

{{/* Ingress rules: dict also rules, a list of dicts with ports (numbers) and from (a list of peers; empty: anyone). */}}
{{- define "steersman.networkPolicy" -}}
{{- if .root.Values.networkPolicy.enabled }}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "steersman.name" . }}
  labels:
    {{- include "steersman.labels" . | nindent 4 }}
spec:
  podSelector:
    matchLabels:
      {{- include "steersman.componentLabels" . | nindent 6 }}
  policyTypes: [Ingress]
  ingress:
    {{- range .rules }}
    - ports:
        {{- range .ports }}
        - port: {{ . }}
          protocol: TCP
        {{- end }}
      {{- with .from }}
      from:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- end }}
    - ports:
        - port: 9090
          protocol: TCP
      from:
        {{- toYaml .root.Values.networkPolicy.monitoringFrom | nindent 8 }}
{{- end }}
{{- end -}}

{{/* A peer of a network policy: pods of a component of this release. */}}
{{- define "steersman.peer" -}}
podSelector:
  matchLabels:
    {{- include "steersman.componentLabels" . | nindent 4 }}
{{- end -}}
