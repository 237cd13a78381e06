"""Computation of the settings that a container gets for its slots: the share (with or without CDI) and the device.

This module runs in the asyncio loop of the device plugin. The module does not check capacity, because the agent checks
capacity when the container starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from fgpu_ebpf.kubernetes.slots import Host, Slot
from fgpu_ebpf.policy.share_name import bound

SHARE_KIND, GPU_KIND = "fgpu.dev/share", "nvidia.com/gpu"
CDI_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
ANNOTATION = "cdi.k8s.io/fgpu-device-plugin_"
VISIBLE = "NVIDIA_VISIBLE_DEVICES"
_MOST_BYTES = 4 << 20


class AllocationError(Exception):
    """The host lacks something that a container needs. The text names the missing part."""


class Strategy(StrEnum):
    """Ways of passing the share to the container."""

    CDI_CRI = "cdi-cri"  # kubelet 1.29 or later passes the names of devices to the runtime
    CDI_ANNOTATIONS = "cdi-annotations"  # any kubelet, and a runtime that reads the names from annotations
    MOUNTS = "mounts"  # a runtime without CDI: mounts of the shim, and annotations that request limits from a policy


class Gpus(StrEnum):
    """Ways of passing the device itself to the container."""

    AUTO = "auto"  # CDI if a specification has the device, else ENVVAR
    CDI = "cdi"
    ENVVAR = "envvar"  # for NVIDIA's container runtime
    NONE = "none"  # by other means: a runtime class, the image


@dataclass(frozen=True, slots=True)
class Given:
    """Settings that kubelet passes to the runtime. `mounts`: read-only mounts as (path on host, path in container)."""

    cdi: tuple[str, ...] = ()
    envs: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    mounts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Way:
    """Ways in which this host passes shares and devices to containers."""

    strategy: Strategy = Strategy.CDI_CRI
    gpus: Gpus = Gpus.AUTO
    folders: tuple[Path, ...] = CDI_FOLDERS

    def give(self, host: Host, slots: Sequence[Slot]) -> Given:
        """Return the settings for one container with these slots. Raise AllocationError on failure."""
        uuids = [slot.uuid for slot in slots]
        if self.strategy is Strategy.MOUNTS:
            return Given((), self._visible(uuids), _asked(host, slots), tuple(host.mounts))
        gpus, visible = self.devices(uuids)
        names = [*gpus, *(f"{SHARE_KIND}={bound(slot.share, slot.uuid)}" for slot in slots)]
        if self.strategy is Strategy.CDI_CRI:
            return Given(tuple(names), visible)
        return Given((), visible, {_annotation(slots): ",".join(names)})

    def devices(self, uuids: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Return the CDI names of devices, and the variables that a container with these devices needs.

        The result has no names if the devices are passed to the container by other means. Raise AllocationError on
        failure.
        """
        gpus = self._gpus(uuids)
        # With "void", NVIDIA's runtime does not add the devices that the image requests.
        return gpus, {VISIBLE: "void"} if gpus else self._visible(uuids)

    def _visible(self, uuids: Sequence[str]) -> dict[str, str]:
        return {} if self.gpus in (Gpus.CDI, Gpus.NONE) else {VISIBLE: ",".join(uuids)}

    def _gpus(self, uuids: Sequence[str]) -> list[str]:
        """Return the CDI names of devices. Indexes are no names, because NVIDIA may number devices differently."""
        if self.gpus not in (Gpus.AUTO, Gpus.CDI):
            return []
        known = _devices(self.folders, GPU_KIND)
        unknown = next((uuid for uuid in uuids if uuid not in known), None)
        if unknown is None:
            return [f"{GPU_KIND}={uuid}" for uuid in uuids]
        if self.gpus is Gpus.CDI:
            fix = "run nvidia-ctk cdi generate --device-name-strategy uuid --output /etc/cdi/nvidia.yaml"
            raise AllocationError(f"no CDI specification has {GPU_KIND}={unknown}: {fix}")
        return []


def _asked(host: Host, slots: Sequence[Slot]) -> dict[str, str]:
    """Return the annotations that request the profile's limits. A policy grants the limits within its bounds."""
    profile = host.devices[slots[0].uuid].profiles[slots[0].share]
    asked = {"fgpu.dev/memory": profile.memory, "fgpu.dev/compute": profile.compute}
    return {key: value for key, value in asked.items() if value}


def _annotation(slots: Iterable[Slot]) -> str:
    """Return an annotation key of at most 63 characters that differs for each resource of a container."""
    return ANNOTATION + hashlib.sha256(",".join(slot.id for slot in slots).encode()).hexdigest()[:16]


def _devices(folders: Iterable[Path], kind: str) -> set[str]:
    """Return the names of all devices of a kind that engines find in these folders. Other files are ignored."""
    import yaml  # imported when needed: only the start of a container reads specifications; JSON is YAML too

    found: set[str] = set()
    for path in (path for folder in folders for path in sorted(folder.glob("*.[jy]*"))):
        try:
            text = path.read_bytes()[:_MOST_BYTES]
            spec = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if kind.encode() in text else None
            if isinstance(spec, dict) and spec.get("kind") == kind:
                found.update(str(device["name"]) for device in spec["devices"])
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            continue
    return found
