{{/* The pod's specification but for its containers: what the workers and the pod of `helm test` share. */}}
{{- define "sentiment-worker.pod" -}}
serviceAccountName: {{ include "sentiment-worker.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false # the variables of a service named worker-… would look like settings
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- $tolerations := .Values.tolerations }}
{{- if eq .Values.device "cuda" }}
{{- $tolerations = append $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- with $tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .Values.model.init }}
{{- if .image }}
initContainers:
  - name: model
    image: {{ .image }}
    command: {{ toJson .command }}
    {{- with .env }}
    env:
      {{- range $name, $value := . }}
      - {name: {{ $name }}, value: {{ toJson $value }}}
      {{- end }}
    {{- end }}
    resources:
      requests: {cpu: 100m, memory: 256Mi}
      limits: {memory: 1Gi}
    securityContext: {{ include "sentiment-worker.containerSecurity" $ | fromYaml | toJson }}
    volumeMounts:
      - {name: model, mountPath: /model}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}
volumes:
  - name: cache # temporary files, and what is fetched from the hub
    emptyDir: {sizeLimit: {{ .Values.cache.sizeLimit }}}
  {{- if .Values.cache.existingClaim }}
  - name: hub
    persistentVolumeClaim: {claimName: {{ .Values.cache.existingClaim }}}
  {{- else if and .Values.cache.claim.create (not .Values.staticMembers) }}
  - name: hub
    persistentVolumeClaim: {claimName: {{ include "sentiment-worker.fullname" . }}-hub}
  {{- end }}
  {{- if .Values.model.init.image }}
  - name: model
    emptyDir: {sizeLimit: {{ .Values.model.init.sizeLimit }}}
  - name: tmp
    emptyDir: {sizeLimit: {{ .Values.model.init.sizeLimit }}}
  {{- else if .Values.model.volume }}
  - name: model
    {{- toYaml .Values.model.volume | nindent 4 }}
  {{- end }}
  {{- if .Values.files }}
  - name: files
    projected:
      defaultMode: 0440
      sources:
        {{- range $name, $file := .Values.files }}
        {{- if $file.serviceAccountToken }}
        - serviceAccountToken: {{ merge (dict "path" $name) $file.serviceAccountToken | toJson }}
        {{- else }}
        - {{ empty $file.configMap | ternary "secret" "configMap" }}: {name: {{ $file.configMap | default $file.secret }}, items: [{key: {{ $file.key | quote }}, path: {{ $name }}}]}
        {{- end }}
        {{- end }}
  {{- end }}
{{- end }}

{{- define "sentiment-worker.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* What the container of a worker and that of `helm test` share. */}}
{{- define "sentiment-worker.container" -}}
image: {{ include "sentiment-worker.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
envFrom:
  - configMapRef: {name: {{ include "sentiment-worker.fullname" . }}}
{{- $named := hasKey .Values.settings "client_id" }}
{{- if or (not $named) .Values.rack.fromZone .Values.files .Values.env }}
env:
  {{- if not $named }}
  - name: WORKER_CLIENT_ID
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  {{- end }}
  {{- if .Values.rack.fromZone }}
  - name: WORKER_CLIENT_RACK # empty, which sets nothing, where Kubernetes does not copy the node's label to the pod
    valueFrom: {fieldRef: {fieldPath: "metadata.labels['{{ .Values.rack.label }}']"}}
  {{- end }}
  {{- range $name, $_ := .Values.files }}
  {{- $variable := $name | upper | printf "WORKER_%s" }}
  {{- if eq $name "hub_token" }}
  {{- $variable = "HF_TOKEN_PATH" }}
  {{- else if not (hasSuffix "file" $name) }}
  {{- $variable = printf "%s_FILE" $variable }}
  {{- end }}
  - {name: {{ $variable }}, value: /run/secrets/sentiment-worker/{{ $name }}}
  {{- end }}
  {{- range $name, $value := .Values.env }}
  - {name: {{ $name }}, value: {{ toJson $value }}}
  {{- end }}
{{- end }}
securityContext: {{- include "sentiment-worker.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: cache, mountPath: /cache}
  {{- if or .Values.cache.existingClaim .Values.cache.claim.create }}
  - {name: hub, mountPath: /cache/huggingface}
  {{- end }}
  {{- if or .Values.model.volume .Values.model.init.image }}
  - {name: model, mountPath: /model, readOnly: true}
  {{- end }}
  {{- if .Values.files }}
  - {name: files, mountPath: /run/secrets/sentiment-worker, readOnly: true}
  {{- end }}
{{- end }}

{{/* Requests and limits: the device's, and over them those of the values. */}}
{{- define "sentiment-worker.resources" -}}
{{- $device := dict "requests" (dict "cpu" "2" "memory" "512Mi") "limits" (dict "memory" "2Gi") }}
{{- if eq .Values.device "cuda" }}
{{- $device = dict "requests" (dict "cpu" "2" "memory" "4Gi") "limits" (dict "memory" "8Gi" "nvidia.com/gpu" 1) }}
{{- end }}
{{- mergeOverwrite $device (deepCopy .Values.resources) | toYaml }}
{{- end }}
