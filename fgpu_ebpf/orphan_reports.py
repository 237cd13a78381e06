"""Tells of memory that outlives its process: an event for each orphan that is held for some seconds, and its keepers.

Runs as a chore of the agent's main loop; the search for keepers has a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fgpu_ebpf.history import History
from fgpu_ebpf.keepers import AGE_NS, Held, Keepers
from fgpu_ebpf.manager import Manager
from fgpu_ebpf.orphans import Orphan
from fgpu_ebpf.reconcile import Truth
from fgpu_ebpf.tenants import Tenant

TOLD_AGE_NS = 5_000_000_000
_Life = tuple[int, int, int]


class OrphanReports:
    """`truth` returns NVML's last look."""

    def __init__(self, truth: Callable[[], Truth], manager: Manager, keepers: Keepers, history: History) -> None:
        self._truth = truth
        self._manager = manager
        self._keepers = keepers
        self._history = history
        self._told: set[_Life] = set()

    def look(self) -> None:
        """Searches keepers of what is held, and tells of each orphan once."""
        now = time.monotonic_ns()
        orphans = self._truth().orphans
        old = [orphan for orphan in orphans if now - orphan.since_ns > AGE_NS]
        tenants = {tenant.cgroup: tenant for tenant in (*self._manager.enforcer, *self._manager.gone)}
        self._keepers.look([_held(orphan, tenants) for orphan in old])
        self._told &= {_life(orphan) for orphan in orphans}
        for orphan in old:
            if now - orphan.since_ns > TOLD_AGE_NS and _life(orphan) not in self._told:
                self._told.add(_life(orphan))
                self._tell(orphan, tenants)

    def _tell(self, orphan: Orphan, tenants: dict[int, Tenant]) -> None:
        tenant = next((tenants[level] for level in orphan.levels if level in tenants), None)
        keepers = ", ".join(map(str, self._keepers.of(orphan.tgid)))
        self._history.add(
            "orphaned", tenant=tenant.name if tenant else "", pid=orphan.tgid, gpu=orphan.device, bytes=orphan.bytes,
            reason="ended" if orphan.ended_ns else "exported",
            text=f"kept by pid {keepers}" if keepers else "no process that keeps it was found",
        )  # fmt: skip


def _life(orphan: Orphan) -> _Life:
    return orphan.tgid, orphan.generation, orphan.device


def _held(orphan: Orphan, tenants: dict[int, Tenant]) -> Held:
    paths = [tenants[level].path for level in orphan.levels if level in tenants]
    return Held(orphan.tgid, (*filter(None, paths), "/"))
