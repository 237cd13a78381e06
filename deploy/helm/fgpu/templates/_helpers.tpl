{{- define "fgpu.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "fgpu.selector" -}}
app.kubernetes.io/name: fgpu
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "fgpu.labels" -}}
{{ include "fgpu.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* The rights of all containers: root, because root owns pins and processes, with only the named capabilities. */}}
{{- define "fgpu.security" -}}
runAsUser: 0
runAsGroup: 0
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* containerd's and CRI-O's AppArmor profile forbids writing to /sys/fs/bpf and reading state of other processes. */}}
{{- define "fgpu.unconfined" -}}
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version -}}
appArmorProfile: {type: Unconfined}
{{- end }}
{{- end }}

{{- define "fgpu.unconfinedBefore130" -}}
{{- $root := index . 0 }}
{{- if not (semverCompare ">=1.30.0-0" $root.Capabilities.KubeVersion.Version) }}
{{- range slice . 1 }}
container.apparmor.security.beta.kubernetes.io/{{ . }}: unconfined
{{- end }}
{{- end }}
{{- end }}

{{/* Paths in /proc/PID/cgroup are relative to the reader's cgroup namespace, and a container has its own namespace.
     Pid 2, a kernel thread, is always in the node's namespace. */}}
{{- define "fgpu.hostCgroups" -}}
"nsenter", "--cgroup=/proc/2/ns/cgroup", "--"
{{- end }}

{{- define "fgpu.pod" -}}
serviceAccountName: {{ .Values.serviceAccount.name }}
{{ include "fgpu.pod.fields" . }}
{{- end }}

{{- define "fgpu.pod.fields" -}}
automountServiceAccountToken: false
enableServiceLinks: false
dnsPolicy: Default
priorityClassName: {{ .Values.priorityClassName }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "fgpu.image.fields" -}}
image: {{ include "fgpu.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{- define "fgpu.engineFolders" -}}
{{- $folders := list }}
{{- range .Values.engines }}
{{- $folders = append $folders (regexReplaceAll "^[a-z]+:" . "" | dir) }}
{{- end }}
{{- $folders | uniq | toJson }}
{{- end }}

{{- define "fgpu.settings" -}}
{{- $settings := dict "listen" (printf "%s:%v" .Values.agent.address .Values.agent.port) "engines" .Values.engines }}
{{- if .Values.devicePlugin.enabled }}
{{- $_ := set $settings "profiles" .Values.devicePlugin.profiles }}
{{- end }}
{{- with .Values.driver.root }}
{{- $_ := set $settings "driverRoot" . }}
{{- end }}
{{- mergeOverwrite $settings .Values.settings | toYaml }}
{{- end }}

{{- define "fgpu.policies" -}}
{{ .Values.existingPolicies | default (printf "%s-policies" .Release.Name) }}
{{- end }}

{{- define "fgpu.monitored" -}}
{{- if not (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1") }}
{{- fail "podMonitor and prometheusRule need the Prometheus operator (monitoring.coreos.com/v1) in the cluster: install the operator first, or add --api-versions monitoring.coreos.com/v1 to helm template" }}
{{- end }}
{{- end }}
