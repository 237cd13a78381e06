"""What this host offers in numbers, and what of it is taken: the agent's answer to a device plugin.

Owns: the form of that answer, and what makes a device unfit. Never: decides who gets what, or remembers anything. On
failure: `fault` says it, and nothing is offered.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpu_ebpf import profiles, shares, xids
from fgpu_ebpf.devices import Device
from fgpu_ebpf.enforcer import Enforcer
from fgpu_ebpf.overrides import Override
from fgpu_ebpf.profiles import Profile, ProfileError
from fgpu_ebpf.reconcile import STALE_SECONDS, Truth

SYSFS = Path("/sys/bus/pci/devices")


@dataclass(frozen=True, slots=True)
class Offers:
    """`devices`: those of this host. `truth`: what NVML said last. `unenforced`: why nothing is held to its limit."""

    profiles: Sequence[Profile]
    devices: Sequence[Device]
    enforcer: Enforcer
    truth: Truth
    unenforced: str

    def view(self, overrides: Iterable[Override], mounts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As JSON has it. Of each profile of a device: `bytes` that one takes, the `count` that are offered, how many
        are `taken` by containers and how many more would fit beside what is committed (`fits`).
        """
        taken = Counter((uuid, override.share) for override in overrides for uuid in override.devices)
        fault, found = self.unenforced, []
        try:
            found = [self._device(device, taken) for device in self.devices]
        except ProfileError as error:
            fault = str(error)
        return {"fault": fault, "devices": found, "mounts": [(m["hostPath"], m["containerPath"]) for m in mounts]}

    def _device(self, device: Device, taken: Mapping[tuple[str, str], int]) -> dict[str, Any]:
        free = max(0, device.usable_bytes - self.enforcer.commitments.committed(device.index))
        return {
            "uuid": device.uuid_text,
            "index": device.index,
            "numa": numa(device.pci_bus_id),
            "fault": self._fault(device.index),
            "free_bytes": free,
            "capacity_bytes": device.usable_bytes,
            "profiles": [
                self._profile(device, name, count, taken[device.uuid_text, name], free)
                for name, count in profiles.counts(self.profiles, device, self.enforcer.commitments.overcommit).items()
            ],
        }

    def _profile(self, device: Device, name: str, count: int, taken: int, free: int) -> dict[str, Any]:
        size, share = profiles.size_bytes(name, device), shares.parse(name)
        fits = count if self.enforcer.commitments.overcommit else free // size
        says = {"memory": share.memory, "compute": share.compute}
        return {"share": name, "bytes": size, "count": count, "taken": taken, "fits": fits, **says}

    def _fault(self, index: int) -> str:
        """Why nothing may be given of a device; empty: it answers, as one that is lost does not, and has reported no
        XID but programs' own.
        """
        reported = self.truth.xids.get(index)
        if reported and reported.fatal is not None:
            return xids.fault(reported.fatal)
        at = self.truth.answered.get(index)
        if at is None:
            return f"NVML has not answered for it: {self.truth.failure}" if self.truth.failure else "NVML is asked"
        age = time.monotonic() - at
        if age <= STALE_SECONDS:
            return ""
        return f"NVML answered {age:.0f} s ago" + (f": {self.truth.failure}" if self.truth.failure else "")


def numa(pci_bus_id: str, sysfs: Path = SYSFS) -> int | None:
    """The memory node that a device is near to; None: the host has one, or does not say."""
    domain, _, rest = pci_bus_id.lower().partition(":")
    try:
        node = int((sysfs / f"{domain[-4:]}:{rest}" / "numa_node").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
