"""A tenant that keeps exported memory, beside the reconcile thread, for tests of orphans."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fgpu_ebpf.agent import ledger_corrections, nvml_reconcile
from fgpu_ebpf.agent.device_balance import CALM_LOOKS
from fgpu_ebpf.agent.nvml_reconcile import Reconciler
from fgpu_ebpf.driver import device_sample
from fgpu_ebpf.linux import procfs
from tests.unit.agent.device_kit import Client, Handle, World
from tests.unit.orphan_kit import MIB

GIB = 1024 * MIB
HELD = 8 * GIB
REST = 32 * MIB  # bytes in use that are in no process's row


class Attack:
    """A tenant with exported memory that a descriptor keeps, and the reconcile thread."""

    def __init__(self) -> None:
        self.world = World(lambda: self.between())
        self.between: Callable[[], None] = lambda: None
        self.reconciler = Reconciler(self.world.nvml, self.world.ledger, lambda _: ())
        self.exporter = self.tenant()

    def tenant(self, has_context: bool = True) -> Client:
        client = self.world.begin()
        if has_context:
            list(self.world.make_context(client))
        return client

    def export_memory(self, bytes_: int = HELD) -> Handle:
        """Export memory of the exporter, and keep a descriptor open."""
        list(self.world.create(self.exporter, bytes_))
        handle = self.world.device.handles[-1]
        handle.is_exported, handle.descriptors = True, 1
        return handle

    def keep_memory(self, bytes_: int = HELD) -> Handle:
        """Leave memory that belongs to no process and that a descriptor keeps."""
        handle = self.export_memory(bytes_)
        list(self.world.release(self.exporter, handle))
        return handle

    def look(self, n: int = CALM_LOOKS + 1) -> None:
        for _ in range(n):
            self.reconciler.look(False)

    def escaped(self) -> int:
        """Return the bytes that tenants hold beyond their charges."""
        return max(0, self.world.device.of_tenants() - self.world.ledger.total() - REST)


def attack_of(monkeypatch: pytest.MonkeyPatch) -> Attack:
    found = Attack()
    monkeypatch.setattr(device_sample, "APART_SECONDS", 0)
    monkeypatch.setattr(procfs, "cgroup_path", lambda _: None)
    monkeypatch.setattr(ledger_corrections, "_is_alive", found.world.is_alive)
    monkeypatch.setattr(nvml_reconcile, "_alive", found.world.is_alive)
    return found
