{{- define "tunepool.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "tunepool.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* (dict "root" $ "part" "api") */}}
{{- define "tunepool.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "tunepool.secret" -}}
{{- required "existingSecret is empty. Make one first: make env && kubectl create secret generic tunepool --from-env-file=.env, then --set existingSecret=tunepool" .Values.existingSecret }}
{{- end }}

{{- /* (dict "root" $ "image" .Values.image.api) */}}
{{- define "tunepool.image" -}}
{{- if .image.digest }}{{ .image.repository }}@{{ .image.digest }}{{ else }}{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "tunepool.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "tunepool.hooked" -}}
{{- if or (eq .Values.migrations.mode "hook") (and (eq .Values.migrations.mode "auto") (not .Values.database.bundled)) }}yes{{ end }}
{{- end }}

{{- define "tunepool.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "tunepool.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* What each process needs to know, as a list of variables. Secrets stay in the Secret. */}}
{{- define "tunepool.env" -}}
{{- $secret := include "tunepool.secret" . }}
{{- $name := include "tunepool.name" . }}
{{- if .Values.database.bundled }}
- {name: POSTGRES_PASSWORD, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: POSTGRES_PASSWORD}}}
- {name: DATABASE_URL, value: "postgresql+psycopg://tunepool:$(POSTGRES_PASSWORD)@{{ $name }}-postgres:5432/tunepool"}
{{- else }}
- {name: DATABASE_URL, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: DATABASE_URL}}}
{{- end }}
{{- if .Values.redis.bundled }}
- {name: VALKEY_PASSWORD, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: VALKEY_PASSWORD}}}
- {name: REDIS_URL, value: "redis://:$(VALKEY_PASSWORD)@{{ $name }}-valkey:6379/0"}
{{- else }}
- {name: REDIS_URL, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: REDIS_URL}}}
{{- end }}
{{- if .Values.storage.bundled }}
- {name: STORAGE_URL, value: "s3://tunepool"}
- {name: TUNEPOOL_STORAGE_ENDPOINT, value: "http://{{ $name }}-s3:7070"}
{{- else }}
- {name: STORAGE_URL, value: {{ required "storage.url is empty: s3://bucket/prefix, gs://… or az://…, or storage.bundled=true" .Values.storage.url | quote }}}
{{- with .Values.storage.endpoint }}
- {name: TUNEPOOL_STORAGE_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- end }}
- {name: TUNEPOOL_STORAGE_REGION, value: {{ .Values.storage.region | quote }}}
{{- if or .Values.storage.bundled .Values.storage.keys }}
- {name: TUNEPOOL_STORAGE_ACCESS_KEY, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: S3_ACCESS_KEY}}}
- {name: TUNEPOOL_STORAGE_SECRET_KEY, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: S3_SECRET_KEY}}}
{{- end }}
- {name: TUNEPOOL_SIGNING_SECRET, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: TUNEPOOL_SIGNING_SECRET}}}
- {name: TUNEPOOL_SECRETS_KEY, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: TUNEPOOL_SECRETS_KEY, optional: true}}}
{{- if .Values.traces.endpoint }}
- {name: OTEL_EXPORTER_OTLP_HEADERS, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: OTEL_EXPORTER_OTLP_HEADERS, optional: true}}}
{{- end }}
{{- end }}

{{- define "tunepool.hubEnv" -}}
- {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: {{ include "tunepool.secret" . }}, key: HF_TOKEN, optional: true}}}
{{- end }}

{{- define "tunepool.envFrom" -}}
- configMapRef: {name: {{ include "tunepool.name" . }}}
{{- end }}

{{- define "tunepool.models" -}}
{{- if .Values.models }}
- {name: models, mountPath: /etc/tunepool, readOnly: true}
{{- end }}
{{- end }}

{{- define "tunepool.modelsVolume" -}}
{{- if .Values.models }}
- {name: models, configMap: {name: {{ include "tunepool.name" . }}-models}}
{{- end }}
{{- end }}

{{- /* Volumes of a pod that trains or answers: (dict "root" $ "part" $worker) */}}
{{- define "tunepool.deviceVolumes" -}}
- name: state
  {{- if .part.state.size }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .part.state.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources: {requests: {storage: {{ .part.state.size }}}}
  {{- else }}
  emptyDir: {}
  {{- end }}
- {name: tmp, emptyDir: {}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .part.shmSize }}}}
{{- with .part.cacheClaim }}
- {name: cache, persistentVolumeClaim: {claimName: {{ . }}}}
{{- end }}
{{- include "tunepool.modelsVolume" .root }}
{{- end }}

{{- define "tunepool.deviceMounts" -}}
- {name: state, mountPath: /state}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
{{- if .part.cacheClaim }}
- {name: cache, mountPath: /cache}
{{- end }}
{{- include "tunepool.models" .root }}
{{- end }}

{{- /* Requests and limits with the devices among the limits: (dict "part" $worker "gpus" 1) */}}
{{- define "tunepool.deviceResources" -}}
{{- $limits := .part.resources.limits | default dict }}
{{- if .gpus }}{{ $limits = merge (dict .part.resourceName .gpus) $limits }}{{ end }}
{{- toYaml (merge (dict "limits" $limits) .part.resources) }}
{{- end }}

{{- define "tunepool.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "tunepool.roll" -}}
checksum/settings: {{ toJson (list .Values.settings .Values.models .Values.storage .Values.publicUrl .Values.traces) | sha256sum }}
{{- end }}

{{- define "tunepool.clusterBytes" -}}
{{- if not .Values.dispatcher.deviceBytes }}{{ fail "dispatcher.deviceBytes is 0: no device is there to ask, so say what memory each has" }}{{ end }}
{{- .Values.dispatcher.deviceBytes | int64 }}
{{- end }}
