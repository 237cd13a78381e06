"""The shares that this host offers to a device plugin, the number of taken shares, and facts for the DRA driver.

This module runs in the agent's main loop. If the `fault` of the host or of a device is not empty, no share of the host
or device is offered. The text of `fault` is the reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpu_ebpf.agent.nvml_reconcile import STALE_SECONDS, Truth
from fgpu_ebpf.containers import cdi
from fgpu_ebpf.driver import xids
from fgpu_ebpf.driver.nvml import Device
from fgpu_ebpf.policy import share_name
from fgpu_ebpf.tenancy import profiles
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.overrides import Override
from fgpu_ebpf.tenancy.profiles import Profile, ProfileError

SYSFS = Path("/sys/bus/pci/devices")
_MIG = "the device is in MIG mode, and limits hold on whole devices only: nvidia-smi -i INDEX -mig 0 ends the mode"


@dataclass(frozen=True, slots=True)
class Offers:
    """The inputs of the offers.

    `truth`: the last result of NVML. `unenforced`: the reason why no limit is in force, or empty.
    """

    profiles: Sequence[Profile]
    devices: Sequence[Device]
    enforcer: Enforcer
    truth: Truth
    unenforced: str

    def view(self, overrides: Iterable[Override], mounts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the offers as JSON values.

        Each profile of a device has `bytes` (of one share), `count` (the number of offered shares), `taken` (the number
        of shares that containers have now) and `fits` (the number of further shares that fit into the memory that is
        not committed; with overcommit, `count`).
        """
        taken = Counter((uuid, override.share) for override in overrides for uuid in override.share_devices)
        fault, found = self.unenforced, []
        try:
            found = [self._device(device, taken) for device in self.devices]
        except ProfileError as error:
            fault = str(error)
        return {"fault": fault, "devices": found, "mounts": [(m["hostPath"], m["containerPath"]) for m in mounts]}

    def facts(self, driver_version: str, parts: cdi.Parts | None) -> dict[str, Any]:
        """Return the facts that only the DRA driver needs, as JSON values.

        The result is not part of view()'s devices, because an earlier version of the device plugin refuses a device
        with additional fields.
        """
        return {
            "driver": driver_version,
            "models": {device.uuid_text: device.name for device in self.devices},
            "overcommit": self.enforcer.commitments.overcommit,
            "parts": [str(path) for path in parts] if parts else [],
        }

    def _device(self, device: Device, taken: Mapping[tuple[str, str], int]) -> dict[str, Any]:
        free = max(0, device.usable_bytes - self.enforcer.commitments.committed(device.index))
        return {
            "uuid": device.uuid_text,
            "index": device.index,
            "numa": numa(device.pci_bus_id),
            "fault": self._failure(device.index) or (_MIG if device.index in self.truth.mig else ""),
            "free_bytes": free,
            "capacity_bytes": device.usable_bytes,
            "profiles": [
                self._profile(device, name, count, taken[device.uuid_text, name], free)
                for name, count in profiles.counts(self.profiles, device, self.enforcer.commitments.overcommit).items()
            ],
        }

    def _profile(self, device: Device, name: str, count: int, taken: int, free: int) -> dict[str, Any]:
        size, share = profiles.size_bytes(name, device), share_name.parse(name)
        fits = count if self.enforcer.commitments.overcommit else free // size
        says = {"memory": share.memory, "compute": share.compute}
        return {"share": name, "bytes": size, "count": count, "taken": taken, "fits": fits, **says}

    def _failure(self, index: int) -> str:
        """Return why no share of a device may be offered.

        The result is empty if NVML answers and the device has no fatal XID.
        """
        reported = self.truth.xids.get(index)
        if reported and reported.fatal is not None:
            return xids.failure(reported.fatal)
        at = self.truth.answered.get(index)
        if at is None:
            return f"NVML has not answered: {self.truth.failure}" if self.truth.failure else "NVML has not answered yet"
        age = time.monotonic() - at
        if age <= STALE_SECONDS:
            return ""
        return f"NVML has not answered for {age:.0f} s" + (f": {self.truth.failure}" if self.truth.failure else "")


def numa(pci_bus_id: str, sysfs: Path = SYSFS) -> int | None:
    """Return the NUMA node of a device, or None if the host has only one node or does not report the node."""
    domain, _, rest = pci_bus_id.lower().partition(":")
    try:
        node = int((sysfs / f"{domain[-4:]}:{rest}" / "numa_node").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
