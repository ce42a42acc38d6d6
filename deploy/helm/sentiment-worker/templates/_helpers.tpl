{{- define "sentiment-worker.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The name of all objects. 52 characters leave room for what is put behind it. */}}
{{- define "sentiment-worker.fullname" -}}
{{- $name := include "sentiment-worker.name" . }}
{{- $own := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) }}
{{- default $own .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* What selects the workers, and no other pod. */}}
{{- define "sentiment-worker.selector" -}}
app.kubernetes.io/name: {{ include "sentiment-worker.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* What the NetworkPolicy selects: the workers, and the pod of `helm test`, which needs the brokers, too. */}}
{{- define "sentiment-worker.part" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: {{ include "sentiment-worker.name" . }}
{{- end }}

{{- define "sentiment-worker.labels" -}}
{{ include "sentiment-worker.selector" . }}
app.kubernetes.io/part-of: {{ include "sentiment-worker.name" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "sentiment-worker.kind" -}}
{{- .Values.staticMembers | ternary "StatefulSet" "Deployment" }}
{{- end }}

{{- define "sentiment-worker.serviceAccountName" -}}
{{- default (.Values.serviceAccount.create | ternary (include "sentiment-worker.fullname" .) "default") .Values.serviceAccount.name }}
{{- end }}

{{- define "sentiment-worker.image" -}}
{{- $tag := default (printf "%s-%s" .Chart.AppVersion .Values.device) .Values.image.tag }}
{{- .Values.image.repository }}{{ .Values.image.digest | empty | ternary (printf ":%s" $tag) (printf "@%s" .Values.image.digest) }}
{{- end }}

{{/* A setting's value as a variable has it. toJson writes a large number with all its digits, toString does not. */}}
{{- define "sentiment-worker.text" -}}
{{- if kindIs "string" . }}{{ . }}{{ else if kindIs "slice" . }}{{ join "," . }}{{ else }}{{ toJson . }}{{ end }}
{{- end }}

{{/*
The settings as JSON, name → text: those of the values, over what the device and the kind of workload need.
A node's cores are not the pod's, so on a CPU nothing is measured at the start, and each pod has the same.
A container sees its GPU as cuda:0, whichever of the node's GPUs it is. A pod without one fails; it does not fall behind on a CPU.
*/}}
{{- define "sentiment-worker.settings" -}}
{{- $given := dict }}
{{- if eq .Values.device "cpu" }}
{{- $given = dict "backend" "onnx" "cpu_threads" "2" "max_batch_tokens" "1024" }}
{{- end }}
{{- if .Values.staticMembers }}
{{- $_ := set $given "session_timeout_ms" "60000" }}
{{- end }}
{{- if or .Values.model.volume .Values.model.init.image }}
{{- $_ := set $given "model" "/model" }}
{{- end }}
{{- range $name, $value := .Values.settings }}
{{- if not (kindIs "invalid" $value) }}
{{- $_ := set $given $name (include "sentiment-worker.text" $value) }}
{{- end }}
{{- end }}
{{- if hasKey $given "input_pattern" }}
{{- $given = omit $given "input_topics" }}
{{- end }}
{{- $names := compact (splitList "," (get $given "http_names")) }}
{{- if .Values.service.enabled }}
{{- $service := include "sentiment-worker.fullname" . }}
{{- $names = concat $names (list $service (printf "%s.%s" $service .Release.Namespace) (printf "%s.%s.svc" $service .Release.Namespace)) }}
{{- end }}
{{- if .Values.ingress.enabled }}
{{- $names = concat $names .Values.ingress.hosts }}
{{- end }}
{{- if $names }}
{{- $_ := set $given "http_names" (join "," (uniq $names)) }}
{{- end }}
{{- $_ := set $given "device" .Values.device }}
{{- $_ := set $given "http_host" "0.0.0.0" }}
{{- $_ := set $given "http_port" (include "sentiment-worker.text" .Values.http.port) }}
{{- toJson $given }}
{{- end }}

{{/* One of those settings, or what stands second in the list where it is not given. */}}
{{- define "sentiment-worker.setting" -}}
{{- $root := index . 0 }}{{ $name := index . 1 }}{{ $default := index . 2 }}
{{- get (include "sentiment-worker.settings" $root | fromJson) $name | default $default }}
{{- end }}
