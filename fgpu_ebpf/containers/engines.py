"""The engines that `fgpu setup` supports: settings files, commands that reload these files, and cgroups of containers.

This module runs in the commands and does no I/O. Slurm is treated like an engine, because its cgroups get limits from a
policy.
"""

from __future__ import annotations

import json
from pathlib import Path

from fgpu_ebpf.containers import engine_config as config
from fgpu_ebpf.containers import engine_conflicts, slurm
from fgpu_ebpf.containers.engine_config import NAME, Engine

_LAST = f"zz-{NAME}.conf"
_PODS = ("kubepods/**/pod*/*", "kubepods.slice/**/cri-containerd-*.scope")
_IMAGE = "ubuntu:24.04"
_GPU = {"limits": {"nvidia.com/gpu": 1}}
_POD = {"name": "first", "image": _IMAGE, "command": ["nvidia-smi"], "resources": _GPU}
_KUBECTL = (
    f"kubectl run first --rm --attach --restart=Never --image={_IMAGE} "
    f"--overrides='{json.dumps({'spec': {'containers': [_POD]}})}'"
)


def _distribution(name: str, service: str) -> Engine:
    """Return the settings of k3s or RKE2. `service`: the command that restarts the engine."""
    file = Path(f"/etc/rancher/{name}/config.yaml.d/zz-{NAME}.yaml")
    return Engine(
        Path(f"/var/lib/rancher/{name}/agent/etc/containerd/config.toml.tmpl"),
        config.template_after,
        config.containerd_without,
        *(service,) * 2,
        programs=(name,),
        more=Engine(file, config.default_after, config.drop_in_without, is_drop_in=True),
        cgroups=_PODS,
        example=_KUBECTL,
    )


ENGINES = {
    "docker": Engine(
        Path("/etc/docker/daemon.json"),
        config.docker_after,
        config.docker_without,
        # After a reload, Docker uses a new default runtime. Docker drops a removed runtime only at a restart.
        "systemctl reload docker",
        "systemctl restart docker",
        programs=("dockerd",),
        read=config.read_json,
        conflict=engine_conflicts.docker_conflict,
        daemon="docker",
        cgroups=("system.slice/docker-*.scope", "docker/*"),
        example=f"docker run --rm --gpus all {_IMAGE} nvidia-smi",
    ),
    "podman": Engine(
        Path("/etc/containers/containers.conf.d", _LAST),
        config.podman_after,
        config.drop_in_without,
        is_drop_in=True,
        programs=("podman",),
        read=config.read_toml,
        # A container of a service has the third name (--cgroups=split, as of Quadlet).
        cgroups=(
            "machine.slice/**/libpod-*.scope",
            "libpod_parent/**/libpod-*",
            "system.slice/**/libpod-payload-*",
        ),
        example=f"podman run --rm --device nvidia.com/gpu=all docker.io/library/{_IMAGE} nvidia-smi",
    ),
    "containerd": Engine(
        Path("/etc/containerd/config.toml"),
        config.containerd_after,
        config.containerd_without,
        *("systemctl restart containerd",) * 2,
        programs=("containerd",),
        read=config.read_toml,
        conflict=engine_conflicts.containerd_conflict,
        cgroups=_PODS,
        example=_KUBECTL,
    ),
    "crio": Engine(
        Path("/etc/crio/crio.conf.d", _LAST),
        config.crio_after,
        config.drop_in_without,
        *("systemctl restart crio",) * 2,
        is_drop_in=True,
        programs=("crio",),
        read=config.read_toml,
        cgroups=("kubepods.slice/**/crio-*.scope",),
        example=_KUBECTL,
    ),
    "k3s": _distribution("k3s", "systemctl restart k3s (on an agent node: k3s-agent)"),
    "rke2": _distribution("rke2", "systemctl restart rke2-server (on an agent node: rke2-agent)"),
    "slurm": Engine(
        slurm.POLICY,
        slurm.after,
        slurm.without,
        reload_undone=slurm.UNDONE,
        programs=("slurmd",),
        keeps_folder=True,
    ),
}
