{{/* Ends with a sentence where values do not fit together and would do harm. Each value for itself is the schema's. */}}
{{- define "sentiment-worker.refuse" -}}
{{- range $name, $_ := .Values.settings }}
{{- if regexMatch "(password|secret|token|file)$" $name }}
{{- fail (printf "settings.%s is a secret or a file: name the Secret that holds it under `files`." $name) }}
{{- else if has $name (list "device" "http_host" "http_port" "group_instance_id" "config") }}
{{- fail (printf "settings.%s is set by the chart: by device, http.port and staticMembers." $name) }}
{{- else if eq $name "until" }}
{{- fail "settings.until is for a run that ends, which a Deployment would start again for ever: use a Job." }}
{{- end }}
{{- end }}
{{- range $name, $_ := .Values.env }}
{{- if regexMatch "^(WORKER_|HF_TOKEN$)" $name }}
{{- fail (printf "env.%s: settings of the worker belong under `settings`, and secrets under `files`." $name) }}
{{- end }}
{{- end }}
{{- $drain := include "sentiment-worker.setting" (list . "drain_timeout_s" "20") | float64 }}
{{- $grace := float64 .Values.terminationGracePeriodSeconds }}
{{- if lt $grace (addf $drain 5 | float64) }}
{{- fail (printf "terminationGracePeriodSeconds is %v, and settings.drain_timeout_s is %v: a worker would be killed while it drains. Five seconds more than the drain are the least." $grace $drain) }}
{{- end }}
{{- if and .Values.keda.enabled .Values.staticMembers }}
{{- fail "keda.enabled does not go with staticMembers: a static member that is scaled down does not leave the group, and its partitions wait for session_timeout_ms. Choose one of them." }}
{{- end }}
{{- if .Values.staticMembers }}
{{- $session := divf (include "sentiment-worker.setting" (list . "session_timeout_ms" "60000") | float64) 1000 }}
{{- if le $session $grace }}
{{- fail (printf "settings.session_timeout_ms is %v s, and terminationGracePeriodSeconds is %v: with staticMembers a worker has to be back within its session, so the session has to be longer." $session $grace) }}
{{- end }}
{{- end }}
{{- with .Values.partitions }}
{{- $most := $.Values.keda.enabled | ternary $.Values.keda.maxReplicas $.Values.replicas }}
{{- if gt (int $most) (int .) }}
{{- fail (printf "%s is %d, and there are %d partitions: a worker without a partition has nothing to do. Choose %d at most." ($.Values.keda.enabled | ternary "keda.maxReplicas" "replicas") (int $most) (int .) (int .)) }}
{{- end }}
{{- end }}
{{- if .Values.keda.enabled }}
{{- if gt (int .Values.keda.minReplicas) (int .Values.keda.maxReplicas) }}
{{- fail "keda.minReplicas is above keda.maxReplicas." }}
{{- end }}
{{- if gt (int .Values.keda.fallback.replicas) (int .Values.keda.maxReplicas) }}
{{- fail "keda.fallback.replicas is above keda.maxReplicas." }}
{{- end }}
{{- if eq (include "sentiment-worker.setting" (list . "sasl_mechanism" "")) "AWS_MSK_IAM" }}
{{- fail "keda.enabled with settings.sasl_mechanism AWS_MSK_IAM: the chart writes no such login for KEDA. Leave keda.enabled off, set replicas to null, and write a ScaledObject of your own." }}
{{- end }}
{{- if and .Values.files.oauth_token_file (not .Values.keda.authenticationRef.name) }}
{{- fail "keda.enabled with files.oauth_token_file: KEDA cannot read that file. Name a TriggerAuthentication of your own in keda.authenticationRef.name." }}
{{- end }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.service.enabled) }}
{{- fail "ingress.enabled needs service.enabled: an Ingress leads to a Service." }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
{{- fail "ingress.enabled needs a name in ingress.hosts: the worker answers only to names that it knows." }}
{{- end }}
{{- if and .Values.monitoring.serviceMonitor.enabled (not .Values.service.enabled) }}
{{- fail "monitoring.serviceMonitor.enabled needs service.enabled; monitoring.podMonitor needs no Service." }}
{{- end }}
{{- if and .Values.monitoring.serviceMonitor.enabled .Values.monitoring.podMonitor.enabled }}
{{- fail "monitoring.podMonitor and monitoring.serviceMonitor would have each worker scraped twice: enable one of them." }}
{{- end }}
{{- if and .Values.model.volume .Values.model.init.image }}
{{- fail "model.volume and model.init.image both fill /model: give one of them." }}
{{- end }}
{{- if and (or .Values.model.volume .Values.model.init.image) .Values.settings.model (not (regexMatch "^/model(/|$)" (toString .Values.settings.model))) }}
{{- fail (printf "settings.model is %s, but a volume or an init container brings the model to /model: leave settings.model out, or name a folder below /model." .Values.settings.model) }}
{{- end }}
{{- if and .Values.cache.existingClaim .Values.cache.claim.create }}
{{- fail "cache.existingClaim and cache.claim.create both give the cache a claim, and pods would share the first: give one of them." }}
{{- end }}
{{- if and .Values.rack.fromZone .Values.settings.client_rack }}
{{- fail "rack.fromZone and settings.client_rack both set the rack: give one of them." }}
{{- end }}
{{- if .Values.networkPolicy.enabled }}
{{- range splitList "," (include "sentiment-worker.setting" (list . "bootstrap_servers" "")) }}
{{- $port := regexFind "[0-9]+$" . | int }}
{{- if not (include "sentiment-worker.opens" (list $ $port)) }}
{{- fail (printf "settings.bootstrap_servers names port %d, which networkPolicy.brokers.ports does not open: the workers could not reach %s." $port .) }}
{{- end }}
{{- end }}
{{- $proxied := or (hasKey .Values.env "HTTPS_PROXY") (hasKey .Values.env "HTTP_PROXY") }}
{{- $iam := eq (include "sentiment-worker.setting" (list . "sasl_mechanism" "")) "AWS_MSK_IAM" }}
{{- if and $iam (not (or $proxied (include "sentiment-worker.opens" (list . 443)) (include "sentiment-worker.opens" (list . 80)))) }}
{{- fail "settings.sasl_mechanism is AWS_MSK_IAM, but networkPolicy.egress opens neither port 443, for the STS of AWS, nor port 80, for 169.254.170.23 (EKS Pod Identity) or 169.254.169.254 (a node's role): the workers would get no credentials." }}
{{- end }}
{{- range $name := list "schema_registry_url" "oauth_token_url" }}
{{- with include "sentiment-worker.setting" (list $ $name "") }}
{{- $port := regexFind "[0-9]+$" (urlParse . | dig "host" "") | default (hasPrefix "https:" . | ternary "443" "80") | int }}
{{- if not (or (include "sentiment-worker.opens" (list $ $port)) (and $proxied (eq $name "oauth_token_url"))) }}
{{- fail (printf "settings.%s names port %d, which networkPolicy.egress does not open: the workers could not reach %s." $name $port .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* "yes" where the NetworkPolicy lets the workers out to a port, be it of one place alone; the list is the root and the port. */}}
{{- define "sentiment-worker.opens" -}}
{{- $port := index . 1 }}
{{- $policy := (index . 0).Values.networkPolicy }}
{{- $open := false }}
{{- range prepend $policy.egress (dict "ports" $policy.brokers.ports) }}
{{- range .ports | default (list dict) }}
{{- if or (not (has (kindOf .port) (list "int" "int64" "float64"))) (and (ge $port (int .port)) (le $port (int (.endPort | default .port)))) }}
{{- $open = true }}
{{- end }}
{{- end }}
{{- end }}
{{- $open | ternary "yes" "" }}
{{- end }}
