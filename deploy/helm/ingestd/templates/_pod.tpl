{{- /* The pod, which is the same with a volume and without one. */ -}}
{{- define "ingestd.pod" -}}
metadata:
  labels:
    {{- include "ingestd.labels" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # Settings are those of the start, so a change is a rollout. Tokens are read again on SIGHUP.
    checksum/settings: {{ include "ingestd.settings" . | sha256sum }}
    {{- with .Values.secretSettings.values }}
    checksum/secrets: {{ toJson . | sha256sum }}
    {{- end }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  # Longer than drain.delay and drain.timeout together, and 10 s.
  terminationGracePeriodSeconds: {{ include "ingestd.grace" . }}
  serviceAccountName: {{ include "ingestd.account" . | quote }}
  automountServiceAccountToken: {{ .Values.serviceAccount.automountToken }}
  # A service's variables look like settings.
  enableServiceLinks: false
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ quote . }}
    {{- end }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ quote . }}
  {{- end }}
  {{- with .Values.podSecurityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  topologySpreadConstraints:
    {{- if .Values.topologySpreadConstraints }}
    {{- toYaml .Values.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - maxSkew: 1
      topologyKey: {{ $key }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "ingestd.selector" $ | nindent 10 }}
    {{- end }}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.podSpec }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with .Values.initContainers }}
  initContainers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ingestd
      image: {{ .Values.image.repository }}{{ with .Values.image.digest }}@{{ . }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
      {{- with .Values.image.pullPolicy }}
      imagePullPolicy: {{ . }}
      {{- end }}
      {{- with .Values.args }}
      args:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      env:
        # A folder below the mount: the daemon makes it, so it can be private.
        - name: INGESTD_DATA_DIR
          value: /var/lib/ingestd/data
        # These settings, also where the image has an ingestd.toml of its own beside the handler.
        - name: INGESTD_CONFIG
          value: /etc/ingestd/ingestd.toml
        {{- if eq .Values.journal.kind "jetstream" }}
        # The log of a replica keeps its name on every node.
        - name: POD_NAME
          valueFrom:
            fieldRef: {fieldPath: metadata.name}
        - name: INGESTD_JOURNAL__JETSTREAM__NAME
          value: {{ .Release.Namespace }}-$(POD_NAME)
        {{- end }}
        {{- with .Values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .Values.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        {{- if .Values.service.enabled }}
        - {name: http, containerPort: 8080}
        {{- end }}
        - {name: admin, containerPort: 8081}
        {{- with .Values.ports }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      # The admin address answers before the journal is recovered and the handler imported.
      startupProbe:
        httpGet: {path: /livez, port: admin}
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: {{ div .Values.startupSeconds 2 }}
      # Takes records; not while it recovers, nor from the moment it is told to go.
      readinessProbe:
        httpGet: {path: /readyz, port: admin}
        {{- toYaml .Values.probes.readiness | nindent 8 }}
      # The event loop turns and no stage hangs. A sink that is down, a slow handler, a full disk
      # or a long recovery are no reasons to start anew.
      livenessProbe:
        httpGet: {path: /livez, port: admin}
        {{- toYaml .Values.probes.liveness | nindent 8 }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      {{- with .Values.securityContext }}
      securityContext:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        - {name: data, mountPath: /var/lib/ingestd}
        - {name: settings, mountPath: /etc/ingestd, readOnly: true}
        {{- if include "ingestd.tokens" . }}
        - {name: tokens, mountPath: /etc/ingestd-tokens, readOnly: true}
        {{- end }}
        {{- if include "ingestd.secrets" . }}
        - {name: secrets, mountPath: /run/secrets, readOnly: true}
        {{- end }}
        - {name: tmp, mountPath: /tmp}
        {{- with .Values.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with .Values.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- if ne .Values.journal.kind "sqlite" }}
    - name: data
      emptyDir: {sizeLimit: {{ .Values.volume.emptyDir }}}
    {{- end }}
    - name: settings
      configMap: {name: {{ include "ingestd.name" . }}-settings}
    {{- with include "ingestd.tokens" . }}
    - name: tokens
      secret: {secretName: {{ quote . }}}
    {{- end }}
    {{- with include "ingestd.secrets" . }}
    - name: secrets
      secret: {secretName: {{ quote . }}}
    {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: {{ .Values.volume.tmp }}}
    {{- with .Values.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
