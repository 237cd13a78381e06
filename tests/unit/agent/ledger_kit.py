"""A ledger of one device, as the kernel keeps it and as the reconcile thread reads it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

from fgpu_ebpf.abi import Seen
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.process_entry import Process
from tests.unit.orphan_kit import MIB, ZEROES, first

CONTEXT = 518 * MIB
LEVELS = (5,)


@dataclass
class Entry:
    """The kernel's entry of a process."""

    generation: int
    begun: int = 0
    changes: int = 0
    bytes: int = 0
    peak: int = 0
    overhead: int = 0
    managed: int = 0
    pool: int = 0
    vmm: int = 0
    contexts: int = 0
    unseen: bool = False
    ended: int = 0
    has_imported: bool = False

    def process(self) -> Process:
        return Process(
            self.generation, LEVELS, Seen.SHIM | Seen.CALL, self.changes, self.begun == self.changes, first(self.bytes),
            first(self.overhead), first(self.managed), first(self.pool), first(self.contexts), False, self.begun, 0,
            ZEROES, first(self.ended), first(self.peak), first(self.vmm),
            unseen=int(self.unseen),
        )  # fmt: skip

    def charge(self, bytes_: int) -> None:
        self.bytes += bytes_
        self.peak = max(self.peak, self.bytes)


class Ledger:
    """The kernel's maps, and the changes that the agent may make to them."""

    def __init__(self, between: Callable[[], None]) -> None:
        self.entries: dict[int, Entry] = {}
        self.kept: dict[tuple[int, int], Orphan] = {}  # (pid, generation) -> entry of the map
        self.freed = 0
        self.so_far = 0
        self.times = SimpleNamespace(shared=dict, turns=dict)
        self.orphans = SimpleNamespace(
            entries=lambda: list(self.kept.values()),
            let_go=self.let_go,
            of_level=lambda _: [],
            levels_with_bytes=lambda *_: [],
            managed_freed=lambda _: self.freed,
            looked=lambda *_: None,
            forget_empty=lambda _: None,
        )
        self._between = between

    def total(self) -> int:
        """Return the sum of all charges."""
        return sum(entry.bytes for entry in self.entries.values()) + self.orphaned()

    def orphaned(self) -> int:
        return sum(orphan.bytes for orphan in self.kept.values())

    # -- changes by the kernel

    def enter(self, pid: int) -> Entry:
        self.so_far += 1
        return self.entries.setdefault(pid, Entry(self.so_far))

    def orphan(self, pid: int, entry: Entry, bytes_: int, has_ended: bool) -> None:
        now = time.monotonic_ns()
        known = self.kept.get((pid, entry.generation))
        before, since_ns = (known.bytes, known.since_ns) if known else (0, now)
        ended_ns = now if has_ended else 0
        if before + bytes_:
            self.kept[pid, entry.generation] = Orphan(
                pid, 0, entry.generation, 0, before + bytes_, since_ns, ended_ns, LEVELS
            )

    def end(self, pid: int, in_flight_managed: int) -> None:
        entry = self.entries.pop(pid, None)
        if entry:
            self.freed += entry.managed + in_flight_managed
            self.orphan(pid, entry, entry.bytes, True)

    # -- changes by the agent

    def processes(self) -> dict[int, Process]:
        self._between()
        return {pid: entry.process() for pid, entry in self.entries.items()}

    def process(self, pid: int) -> Process | None:
        return self.entries[pid].process() if pid in self.entries else None

    def tenants(self) -> dict[int, int]:
        return {}

    def processes_so_far(self) -> int:
        return self.so_far

    def mark(self, pid: int, generation: int, device: int) -> bool:
        entry = self._entry(pid, generation)
        if entry:
            entry.peak = entry.bytes
        return bool(entry)

    def _entry(self, pid: int, generation: int) -> Entry | None:
        entry = self.entries.get(pid)
        return entry if entry and entry.generation == generation else None

    def overhead(self, pid: int, generation: int, device: int, bytes_: int, changes: int) -> bool:
        entry = self._entry(pid, generation)
        if not entry or entry.begun != changes or entry.changes != changes:
            return False
        return self.raise_overhead(pid, generation, device, bytes_ - entry.overhead)

    def raise_overhead(self, pid: int, generation: int, device: int, more: int) -> bool:
        entry = self._entry(pid, generation)
        if entry:
            entry.begun += 1
            entry.charge(more)
            entry.overhead += more
            entry.changes += 1
        return bool(entry)

    def context_seen(self, pid: int, generation: int, device: int, changes: int) -> bool:
        entry = self._entry(pid, generation)
        if not entry or entry.begun != changes or entry.changes != changes:
            return False
        if not entry.contexts:
            entry.contexts, entry.unseen = 1, True
        return True

    def context_gone(self, pid: int, generation: int, device: int, changes: int) -> bool:
        entry = self._entry(pid, generation)
        if not entry or entry.begun != changes or entry.changes != changes:
            return False
        if entry.unseen:
            entry.contexts, entry.unseen = entry.contexts - 1, False
        return True

    def let_go(self, orphan: Orphan, bytes_: int) -> bool:
        key = orphan.tgid, orphan.generation
        if self.kept.get(key) != orphan:
            return False
        left = orphan.bytes - bytes_
        assert left >= 0
        del self.kept[key]
        if left:
            self.kept[key] = replace(orphan, bytes=left)
        return True

    def context_bytes(self, _: int) -> int:
        return CONTEXT

    def sweep(self) -> int:
        return 0

    def reap(self, pid: int, generation: int) -> None:
        raise AssertionError("the kernel has recorded every exit")
