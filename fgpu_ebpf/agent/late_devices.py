"""Report devices that had no NVML handle at the agent's start, and add each device as soon as NVML finds the device.

This module runs in the agent's main loop, once a round. The reconcile thread queries NVML. Until NVML finds a device,
no tenant gets memory on that device.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field

from fgpu_ebpf.agent.nvml_reconcile import Reconciler
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver.context_sizes import DEFAULT_CONTEXT_BYTES
from fgpu_ebpf.driver.nvml import Device, Nvml
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.manager import Manager

NAME = "devices"
_FIX = "nvidia-smi and dmesg | grep -i xid show the reason; after a reset or a reboot the agent manages the GPU again"


@dataclass(slots=True)
class LateDevices:
    """The devices that NVML has not found yet.

    `contexts`: the size of one context in bytes, by ledger index. `failed_checks`: the agent's failed checks by name.
    This class changes `contexts` and `failed_checks`.
    """

    nvml: Nvml
    ledger: Ledger
    manager: Manager
    reconciler: Reconciler
    history: EventLog
    contexts: MutableMapping[int, int]
    failed_checks: MutableMapping[str, Check]
    _named: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Add the devices that NVML has found since the last round, and report the missing devices."""
        if arrived := self.nvml.arrived():
            for device in arrived:
                self._enter(device)
            self.manager.consider_all()
            self.ledger.new_epoch()  # programs get the device at their next registration
        self._name(dict(self.nvml.missing))

    def _enter(self, device: Device) -> None:
        known = (self.contexts.get(other.index) for other in self.nvml.devices if other.name == device.name)
        self.contexts[device.index] = next(filter(None, known), DEFAULT_CONTEXT_BYTES)
        self.ledger.set_device(device.index, device.uuid)
        self.ledger.set_context_bytes(device.index, self.contexts[device.index])
        self.nvml.devices.append(device)
        self.nvml.devices.sort(key=lambda device: device.index)
        self.manager.enforcer.commitments.add_device(device)
        self.reconciler.add_device(device.index)
        self.history.add("device found", gpu=device.index, text=f"{device.name}, {device.uuid_text}")

    def _name(self, missing: MutableMapping[str, str]) -> None:
        self.failed_checks.pop(NAME, None)
        if missing:
            self.failed_checks[NAME] = Check("devices", False, _words(missing.items()), _FIX)
        for uuid in missing.keys() - self._named:
            self.history.add("device missing", text=f"{uuid}: {missing[uuid]}")
        self._named = set(missing)


def _words(missing: Iterable[tuple[str, str]]) -> str:
    return "no limit can be enforced on " + "; ".join(f"{name} ({why})" for name, why in sorted(missing))
