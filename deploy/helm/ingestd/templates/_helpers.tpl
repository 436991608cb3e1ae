{{- /* Of a release's name the name of a service: no dot in it, and no digit first. */ -}}
{{- define "ingestd.name" -}}
{{- $release := .Release.Name | replace "." "-" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride }}
{{- else if regexMatch "^[0-9]" $release -}}
{{ printf "ingestd-%s" $release | trunc 52 | trimSuffix "-" }}
{{- else if contains "ingestd" $release -}}
{{ $release | trunc 52 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-ingestd" ($release | trunc 44 | trimSuffix "-") }}
{{- end -}}
{{- end }}

{{- /* The chart's name is its alias where it is several dependencies of one chart. */ -}}
{{- define "ingestd.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "ingestd.labels" -}}
{{ include "ingestd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "ingestd.account" -}}
{{ .Values.serviceAccount.name | default (include "ingestd.name" .) }}
{{- end }}

{{- define "ingestd.workload" -}}
{{ ternary "Deployment" "StatefulSet" (eq .Values.journal.kind "memory") }}
{{- end }}

{{- /* Seconds for which a pod finishes what it took. */ -}}
{{- define "ingestd.drain" -}}
{{ ternary .Values.drain.timeout .Values.autoscaling.drainTimeout (eq .Values.autoscaling.kind "none") | int }}
{{- end }}

{{- define "ingestd.grace" -}}
{{ add .Values.drain.delay (include "ingestd.drain" .) 15 }}
{{- end }}

{{- /* The keys of a table, as JSON; one whose value is null is one that a file of values takes back. */ -}}
{{- define "ingestd.keys" -}}
{{- $keys := list }}
{{- range $key := keys . | sortAlpha }}
{{- if not (kindIs "invalid" (get $ $key)) }}{{ $keys = append $keys $key }}{{ end }}
{{- end }}
{{- toJson $keys }}
{{- end }}

{{- /* A value as TOML has it on one line; toToml would make a float of every number. */ -}}
{{- define "ingestd.toml" -}}
{{- if kindIs "map" . -}}
{ {{- range $i, $key := include "ingestd.keys" . | fromJsonArray }}{{ if $i }}, {{ end }}{{ toRawJson $key }} = {{ include "ingestd.toml" (get $ $key) }}{{ end -}} }
{{- else if kindIs "slice" . -}}
[ {{- range $i, $one := . }}{{ if $i }}, {{ end }}{{ include "ingestd.toml" $one }}{{ end -}} ]
{{- else -}}
{{ toRawJson . }}
{{- end -}}
{{- end }}

{{- /* ingestd.toml: what the chart decides, over the settings of the values. */ -}}
{{- define "ingestd.settings" -}}
{{- $given := .Values.settings | default dict }}
{{- $files := dict }}
{{- range ternary .Values.tokens.names (keys .Values.tokens.hashes) (ne .Values.tokens.existingSecret "") }}
{{- $_ := set $files . (dict "file" (printf "/etc/ingestd-tokens/%s" .)) }}
{{- end }}
{{- if not (or $files $given.http $given.source $given.sources) }}
{{- fail "Nothing says which clients may send records: set tokens.hashes, or tokens.existingSecret and tokens.names, or settings.http (docs/SECURITY.md)." }}
{{- end }}
{{- if and (eq .Values.journal.kind "jetstream") (not (dig "journal" "jetstream" "servers" "" $given)) }}
{{- fail "journal.kind jetstream needs the servers: set settings.journal.jetstream.servers (docs/ENGINE.md, deploy/helm/values/jetstream.yaml)." }}
{{- end }}
{{- with .Values.autoscaling }}
{{- if and (ne .kind "none") (gt (int .min) (int .max)) }}
{{- fail (printf "autoscaling.min is %d, and should be autoscaling.max (%d) or less." (int .min) (int .max)) }}
{{- end }}
{{- end }}
{{- $bounds := dict }}
{{- if ne .Values.journal.kind "sqlite" }}
{{- /* Less than the container's limits: from here on clients are told to come again. */}}
{{- $bounds = dict "journal" (dict "bytes_max" "256MiB") "dead" (dict "bytes_max" "64MiB") }}
{{- if dig "journal" "jetstream" "adopt" false $given }}
{{- /* There is what another daemon left pending, too. */}}
{{- $bounds = dict "journal" (dict "bytes_max" "128MiB") "dead" (dict "bytes_max" "32MiB") }}
{{- end }}
{{- end }}
{{- $own := dict "journal" (dict "kind" .Values.journal.kind) "drain" (dict "delay" (printf "%ds" (int .Values.drain.delay)) "timeout" (printf "%ss" (include "ingestd.drain" .))) }}
{{- if $files }}
{{- $_ := set $own "http" (dict "tokens" $files) }}
{{- end }}
{{- $all := mergeOverwrite $bounds (deepCopy $given) $own -}}
# Written by the chart from its values. See config/ingestd.toml for every setting there is.
{{- range $key := include "ingestd.keys" $all | fromJsonArray }}
{{- if not (kindIs "map" (get $all $key)) }}
{{ $key }} = {{ include "ingestd.toml" (get $all $key) }}
{{- end }}
{{- end }}
{{- range $table := keys $all | sortAlpha }}
{{- if kindIs "map" (get $all $table) }}

[{{ $table }}]
{{- $values := get $all $table }}
{{- range $key := include "ingestd.keys" $values | fromJsonArray }}
{{ toRawJson $key }} = {{ include "ingestd.toml" (get $values $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The Secret that is mounted, and whether there is one: the name, or nothing. */ -}}
{{- define "ingestd.tokens" -}}
{{- if .Values.tokens.existingSecret -}}
{{ .Values.tokens.existingSecret }}
{{- else if .Values.tokens.hashes -}}
{{ include "ingestd.name" . }}-tokens
{{- end -}}
{{- end }}

{{- define "ingestd.secrets" -}}
{{- if .Values.secretSettings.existingSecret -}}
{{ .Values.secretSettings.existingSecret }}
{{- else if .Values.secretSettings.values -}}
{{ include "ingestd.name" . }}-secrets
{{- end -}}
{{- end }}
