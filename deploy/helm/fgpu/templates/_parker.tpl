{{/* Fields of the parker's container, in the pod of its own and in the pod that detaches. */}}
{{- define "fgpu.parker" -}}
{{ include "fgpu.image.fields" . }}
args: ["--wait-for-jobs", "--driver-root={{ .Values.driver.root | default "/" }}"]
env:
  {{- if not .Values.driver.root }}
  - {name: NVIDIA_VISIBLE_DEVICES, value: all}
  - {name: NVIDIA_DRIVER_CAPABILITIES, value: "compute,utility"}
  {{- end }}
  - {name: PYTHONDONTWRITEBYTECODE, value: "1"}
securityContext:
  {{- include "fgpu.security" . | nindent 2 }}
  {{- include "fgpu.unconfined" . | nindent 2 }}
  capabilities:
    drop: [ALL]
    # SYS_PTRACE, DAC_OVERRIDE: the driver reaches a process of any user through its folder in /proc.
    # DAC_READ_SEARCH: cgroups of tenants of any user. SYS_ADMIN: the driver restores memory; the node's
    # cgroup namespace.
    add: [DAC_OVERRIDE, DAC_READ_SEARCH, SYS_ADMIN, SYS_PTRACE]
resources: {{- toYaml .Values.parking.resources | nindent 2 }}
{{- end }}
