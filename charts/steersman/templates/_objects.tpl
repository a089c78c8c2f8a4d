{{/* Objects that every component has in the same way. Each takes root, component and values. */}}

{{- define "steersman.serviceAccount" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "steersman.metadata" (merge (dict "annotations" .values.serviceAccount.annotations) .) | nindent 2 }}
automountServiceAccountToken: false
{{- end -}}

{{- define "steersman.pdb" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "steersman.metadata" . | nindent 2 }}
spec:
  maxUnavailable: {{ .values.pdb.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "steersman.selectorLabels" . | nindent 6 }}
{{- end -}}

{{/* dict also query: what KEDA asks Prometheus. */}}
{{- define "steersman.autoscaler" -}}
{{- $auto := .values.autoscaling -}}
{{- if eq $auto.kind "hpa" }}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  {{- include "steersman.metadata" . | nindent 2 }}
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
  {{- include "steersman.metadata" . | nindent 2 }}
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
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  {{- include "steersman.metadata" (merge (dict "name" (printf "%s-cache" (include "steersman.name" .))) .) | nindent 2 }}
spec:
  accessModes: {{ toJson .values.modelCache.accessModes }}
  {{- with .values.modelCache.storageClass }}
  storageClassName: {{ . }}
  {{- end }}
  resources:
    requests:
      storage: {{ .values.modelCache.size }}
{{- end -}}

{{/* Peers of a network policy: pods of components of this release; dict root, components. */}}
{{- define "steersman.peers" -}}
{{- $root := .root -}}
{{- range .components }}
- podSelector:
    matchLabels:
      {{- include "steersman.componentLabels" (dict "root" $root "component" .) | nindent 6 }}
{{- end }}
{{- end -}}

{{/*
Head of the NetworkPolicy of a component whose pods also belong to runs: dict like "steersman.metadata", and private:
true for the pods that the run's own policy, made by the controller, opens to the run alone; false for the others.
*/}}
{{- define "steersman.privatePolicy" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- $name := include "steersman.name" . }}
  {{- include "steersman.metadata" (merge (dict "name" (ternary (printf "%s-runs" $name) $name .private)) .) | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "steersman.componentLabels" . | nindent 6 }}
    {{- if .root.Values.networkPolicy.perRun }}
    matchExpressions:
      - {key: steersman.dev/only-for, operator: {{ ternary "Exists" "DoesNotExist" .private }}}
    {{- end }}
  policyTypes: [Ingress{{ if .root.Values.networkPolicy.egress.enabled }}, Egress{{ end }}]
{{- end -}}

{{/* What every pod may ask: names; and whatever the values add for its component. */}}
{{- define "steersman.egress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
  {{- with .root.Values.networkPolicy.egress.dns }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- with index .root.Values.networkPolicy.egress.extra .component }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Ingress of the metrics' port. */}}
{{- define "steersman.metricsIngress" -}}
- ports:
    - {port: 9090, protocol: TCP}
  from:
    {{- toYaml .root.Values.networkPolicy.monitoringFrom | nindent 4 }}
{{- end -}}
