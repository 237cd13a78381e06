"""Releases orphaned bytes that are charged to running programs again, after a change of the ledger's layout.

If a start finds another layout, it enters the charges of each level there as orphaned bytes without an entry
(`other_layouts`). The first passes charge each program that was running with the bytes in its row of NVML, and the
orphaned bytes fall by as many. The rest is memory in no row of NVML, or memory of exited processes; `OrphanRelease`
releases it once the device does not hold it.

The reconcile thread uses this module in the first seconds of such a start. After an error the bytes stay charged.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from fgpu_ebpf.ledger.ledger import Ledger

SECONDS = 3.0  # several passes; too short for running programs to allocate much that would be taken for it

_Where = tuple[int, int]  # level and device


class Carried:
    """Bytes carried over. `pids`: the programs that ran before the change; empty: the layout has not changed."""

    def __init__(self, ledger: Ledger, pids: Iterable[int]) -> None:
        self._ledger, self._pids = ledger, frozenset(pids)
        self._until = time.monotonic() + SECONDS
        self._before: dict[_Where, int] = self._orphaned() if self._pids else {}

    def look(self) -> None:
        """Release as many bytes as the programs that were running are charged by now."""
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
        """Return orphaned bytes without an entry. The pages are read first: see orphans.bpf.h."""
        pages = {level: self._ledger.orphans.of_level(level) for level in self._ledger.tenants()}
        found = Counter(
            {(level, d): bytes_ for level, said in pages.items() for d, bytes_ in enumerate(said) if bytes_}
        )
        for orphan in self._ledger.orphans.entries():
            found.subtract({(level, orphan.device): orphan.bytes for level in orphan.levels})
        return {where: bytes_ for where, bytes_ in found.items() if bytes_ > 0}
