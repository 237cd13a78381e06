{{/* This container runs instead of agent and gatekeeper. It removes their files and pins from the node, repeatedly,
     because one of the two may still run. The store of `fgpu usage` stays. */}}
{{- define "fgpu.detach" -}}
containers:
  - name: detach
    {{- include "fgpu.image.fields" . | nindent 4 }}
    command:
      - nsenter
      - --cgroup=/proc/2/ns/cgroup
      - --
      - sh
      - -c
      - |
        trap 'exit 0' TERM
        while :; do
            [ ! -e /run/fgpu ] || fgpu detach
            rm -f /var/lib/fgpu/contexts.json /run/cdi/fgpu.dev-claim_*.json
            rmdir /var/lib/fgpu 2>/dev/null
            sleep 2 & wait $!
        done
    securityContext:
      {{- include "fgpu.security" . | nindent 6 }}
      {{- include "fgpu.unconfined" . | nindent 6 }}
      capabilities:
        drop: [ALL]
        # Those of the agent without KILL and SYS_NICE. No capability is needed to stop the gatekeeper, which runs as root.
        add: [DAC_READ_SEARCH, SYS_ADMIN, SYS_PTRACE]
    resources: {{- toYaml .Values.agent.resources | nindent 6 }}
    readinessProbe:
      exec: {command: ["sh", "-c", "test ! -e /run/fgpu/agent.lock && test ! -e /run/fgpu/gatekeeper.lock && test ! -e /run/fgpu/parker.sock && test ! -e /sys/fs/bpf/fgpu"]}
      periodSeconds: 2
      timeoutSeconds: 5
    volumeMounts:
      - {name: bpf, mountPath: /sys/fs/bpf}
      - {name: cgroup, mountPath: /sys/fs/cgroup}
      - {name: run, mountPath: /run}
      - {name: lib, mountPath: /var/lib}
  {{- if .Values.parking.enabled }}
  # Wakes parked tenants for `fgpu detach`. The parker ends when its socket is removed, and must not create another socket.
  - name: parker
    command:
      - nsenter
      - --cgroup=/proc/2/ns/cgroup
      - --
      - sh
      - -c
      - |
        trap 'kill $!; wait $!; exit 0' TERM
        while :; do
            [ ! -e /sys/fs/bpf/fgpu ] || { fgpu-parker "$@" & wait $!; }
            sleep 2 & wait $!
        done
      - sh
    {{- include "fgpu.parker" . | nindent 4 }}
    volumeMounts:
      - {name: bpf, mountPath: /sys/fs/bpf, readOnly: true}
      - {name: cgroup, mountPath: /sys/fs/cgroup, readOnly: true}
      - {name: run, mountPath: /run}
      {{- with .Values.driver.root }}
      - {name: driver, mountPath: {{ . }}, readOnly: true, mountPropagation: HostToContainer}
      {{- end }}
  {{- end }}
volumes:
  {{- if and .Values.parking.enabled .Values.driver.root }}
  - {name: driver, hostPath: {path: {{ .Values.driver.root }}, type: Directory}}
  {{- end }}
  - {name: bpf, hostPath: {path: /sys/fs/bpf, type: Directory}}
  - {name: cgroup, hostPath: {path: /sys/fs/cgroup, type: Directory}}
  # The folders themselves are removed, so they cannot be mounted here.
  - {name: run, hostPath: {path: /run, type: Directory}}
  - {name: lib, hostPath: {path: /var/lib, type: Directory}}
{{- end }}
