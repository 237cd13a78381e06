"""Prevent double charges of running programs after a change of the ledger's layout.

An agent that finds pinned maps of another layout at its start copies the charges of each level into its own ledger, as
orphaned bytes without an entry (`other_layouts`). The first reconcile passes charge each running program with the bytes
that NVML shows for the program. This module then releases the same number of orphaned bytes. The remaining orphaned
bytes are memory that NVML shows for no process, or memory of exited processes. `OrphanRelease` releases these bytes
once the device no longer holds this memory.

This module runs in the reconcile thread, in the first seconds after an agent's start with a changed layout. After an
error the bytes stay charged.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from fgpu_ebpf.ledger.ledger import Ledger

# The time is long enough for several passes, and short because new allocations of running programs in this time are
# mistaken for carried bytes.
SECONDS = 3.0

_Where = tuple[int, int]  # level and device


class Carried:
    """The orphaned bytes that the agent copied from maps of another layout, until these bytes are released.

    `pids`: the programs that ran before the change; empty if the layout has not changed.
    """

    def __init__(self, ledger: Ledger, pids: Iterable[int]) -> None:
        self._ledger, self._pids = ledger, frozenset(pids)
        self._until = time.monotonic() + SECONDS
        self._before: dict[_Where, int] = self._orphaned() if self._pids else {}

    def look(self) -> None:
        """Release as many orphaned bytes as the programs of `pids` are charged with now."""
        if not self._before:
            return
        charged: Counter[_Where] = Counter()
        processes = self._ledger.processes()
        for process in (processes[pid] for pid in self._pids if pid in processes):
            for level in process.levels:
                charged.update({(level, device): bytes_ for device, bytes_ in enumerate(process.bytes)})
        for where, bytes_ in self._orphaned().items():
            more = bytes_ - max(0, self._before[where] - charged[where]) if where in self._before else 0
            if more > 0:
                self._ledger.orphans.disown(*where, more)
        if time.monotonic() > self._until:
            self._before = {}

    def _orphaned(self) -> dict[_Where, int]:
        """Return the orphaned bytes without an entry, by level and device.

        The pages are read before the entries, for the reason in orphans.bpf.h.
        """
        pages = {level: self._ledger.orphans.of_level(level) for level in self._ledger.tenants()}
        found = Counter(
            {(level, d): bytes_ for level, said in pages.items() for d, bytes_ in enumerate(said) if bytes_}
        )
        for orphan in self._ledger.orphans.entries():
            found.subtract({(level, orphan.device): orphan.bytes for level in orphan.levels})
        return {where: bytes_ for where, bytes_ in found.items() if bytes_ > 0}
