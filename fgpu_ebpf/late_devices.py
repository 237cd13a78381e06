"""Devices that had no handle when the agent started: named, and taken in as soon as NVML finds them.

Runs in the agent's main loop, once a round; the reconcile thread asks NVML. On failure: the device stays out, and no
tenant gets memory on it.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field

from fgpu_ebpf.checks import Check
from fgpu_ebpf.context_sizes import DEFAULT_CONTEXT_BYTES
from fgpu_ebpf.devices import Device, Nvml
from fgpu_ebpf.history import History
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.manager import Manager
from fgpu_ebpf.reconcile import Reconciler

NAME = "devices"
_FIX = "nvidia-smi and dmesg | grep -i xid say why; after a reset or a reboot it is taken in by itself"


@dataclass(slots=True)
class LateDevices:
    """`contexts`: bytes of one context by ledger index; `lacks`: what is missing. Both are the agent's, and change."""

    nvml: Nvml
    ledger: Ledger
    manager: Manager
    reconciler: Reconciler
    history: History
    contexts: MutableMapping[int, int]
    lacks: MutableMapping[str, Check]
    _named: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Takes in what NVML has found since the last round, and names what is missing."""
        if arrived := self.nvml.arrived():
            for device in arrived:
                self._enter(device)
            self.manager.consider_all()
            self.ledger.new_epoch()  # programs learn of the device by their next hello
        self._name(dict(self.nvml.missing))

    def _enter(self, device: Device) -> None:
        known = (self.contexts.get(other.index) for other in self.nvml.devices if other.name == device.name)
        self.contexts[device.index] = next(filter(None, known), DEFAULT_CONTEXT_BYTES)
        self.ledger.set_device(device.index, device.uuid)
        self.ledger.set_context_bytes(device.index, self.contexts[device.index])
        self.nvml.devices.append(device)
        self.nvml.devices.sort(key=lambda one: one.index)
        self.manager.enforcer.commitments.add_device(device)
        self.reconciler.add_device(device.index)
        self.history.add("device found", gpu=device.index, text=f"{device.name}, {device.uuid_text}")

    def _name(self, missing: MutableMapping[str, str]) -> None:
        self.lacks.pop(NAME, None)
        if missing:
            self.lacks[NAME] = Check("devices", False, _words(missing.items()), _FIX)
        for one in missing.keys() - self._named:
            self.history.add("device missing", text=f"{one}: {missing[one]}")
        self._named = set(missing)


def _words(missing: Iterable[tuple[str, str]]) -> str:
    return "no limit can be enforced on " + "; ".join(f"{name} ({why})" for name, why in sorted(missing))
