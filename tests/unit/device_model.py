"""A device, what NVML says of it, and a ledger of its tenants, in MiB-sized steps; for tests of what is let go when.

Every change is a list of small steps, as the kernel and the driver make them: what is taken is charged first, what is
freed is released last. Steps may come between any two questions of a look.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from fgpu_ebpf import pages
from fgpu_ebpf.orphan_release import CONTEXT_REST_BYTES, DEVICE_REST_BYTES
from fgpu_ebpf.orphans import Orphan
from fgpu_ebpf.processes import Process
from fgpu_ebpf.reconcile import Reconciler

MIB = 1 << 20
CONTEXT = 512 * MIB
NOT_A_PID = 1 << 23  # above every pid of this machine
ZEROES = (0,) * pages.DEVICES
Step = Callable[[], Any]
Action = list[Step]


def first(bytes_: int) -> tuple[int, ...]:
    """So many bytes on the first device."""
    return bytes_, *ZEROES[1:]


@dataclass
class Live:
    """A process of a tenant: what it has on the device, and what it is charged."""

    pid: int
    generation: int
    contexts: int = 0
    plain: int = 0
    handles: int = 0
    imported: int = 0
    resident: int = 0  # of its managed memory
    charged: int = 0  # plain memory and handles
    managed: int = 0
    overhead: int = 0
    begun: int = 0
    changes: int = 0
    peak: int = 0  # of what it was charged, since it was marked

    def bytes(self) -> int:
        """All that is charged."""
        return self.charged + self.managed + self.overhead

    def row(self) -> int:
        """What NVML shows, if it names the process."""
        return self.contexts * CONTEXT + self.plain + self.handles + self.imported

    def entry(self) -> Process:
        """As the ledger has it."""
        return Process(
            self.generation, (1,), 0, self.changes, self.begun == self.changes, first(self.bytes()),
            first(self.overhead), first(self.managed), ZEROES, first(self.contexts), begun=self.begun,
            peak=first(self.peak),
        )  # fmt: skip


@dataclass
class Ended:
    """What a process that has ended still has there: as long as the driver needs, or something keeps it."""

    pid: int
    row: int
    resident: int


@dataclass
class Stranger:
    """A process that is in no managed cgroup."""

    plain: int = 0
    resident: int = 0


@dataclass
class Host:
    """One device and its ledger. `between`: what happens between two questions of a look, in turn."""

    live: dict[int, Live] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)
    strangers: dict[int, Stranger] = field(default_factory=dict)
    exported: list[int] = field(default_factory=list)  # bytes that descriptors hold, in no row, and charged as orphans
    charged_orphans: dict[tuple[int, int], Orphan] = field(default_factory=dict)
    freed: int = 0
    between: Iterator[Step] = field(default_factory=lambda: iter(()))
    now: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    lives: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    # -- what the device holds

    def in_use(self) -> int:
        """All of it, with what no process's row has."""
        rows = sum(live.row() for live in self.live.values()) + sum(ended.row for ended in self.ended)
        others = sum(CONTEXT + stranger.plain for stranger in self.strangers.values())
        managed = self.resident() + sum(stranger.resident for stranger in self.strangers.values())
        contexts = sum(max(1, self.live[pid].contexts if pid in self.live else 0) for pid in self.rows())
        rest = contexts * CONTEXT_REST_BYTES + DEVICE_REST_BYTES  # where it is less, so much is let go too early
        return rows + others + managed + sum(self.exported) + rest

    def resident_of_live(self) -> int:
        """Managed memory of processes that live, as far as it is on the device."""
        return sum(live.resident for live in self.live.values())

    def resident(self) -> int:
        """Of all tenants."""
        return self.resident_of_live() + sum(ended.resident for ended in self.ended)

    def held(self) -> int:
        """For tenants, the rest left out."""
        rows = sum(live.row() for live in self.live.values()) + sum(ended.row for ended in self.ended)
        return rows + self.resident() + sum(self.exported)

    def held_by_none(self) -> int:
        """For processes that have ended, and for descriptors."""
        return sum(ended.row + ended.resident for ended in self.ended) + sum(self.exported)

    def charged(self) -> int:
        """For tenants."""
        return sum(live.bytes() for live in self.live.values()) + self.orphaned()

    def orphaned(self) -> int:
        return sum(orphan.bytes for orphan in self.charged_orphans.values())

    # -- changes of one process, step by step

    def begin(self, pid: int) -> None:
        self.live[pid] = Live(pid, next(self.lives))

    def change(self, live: Live, **by: int) -> Action:
        """One step: these fields by so many bytes; nothing where the process is gone or another one by then."""

        def step() -> None:
            if self.live.get(live.pid) is live:
                for name, more in by.items():
                    setattr(live, name, getattr(live, name) + more)
                live.peak = max(live.peak, live.bytes())

        return [step]

    def take(self, live: Live, what: str, bytes_: int) -> Action:
        """Plain memory, a handle or managed memory, which is on the device when it is touched."""
        charge = "managed" if what == "managed" else "charged"
        got = {} if what == "managed" else {what: bytes_}
        return [
            *self.change(live, begun=1, **{charge: bytes_}),
            *self.change(live, **got),
            *self.change(live, changes=1),
        ]

    def free(self, live: Live, what: str, bytes_: int) -> Action:
        """Of managed memory, what is on the device goes first."""
        charge = "managed" if what == "managed" else "charged"
        touched = min(live.resident, bytes_)
        gone = {"resident": -touched} if what == "managed" else {what: -bytes_}

        def count() -> None:
            if self.live.get(live.pid) is live and what == "managed":
                self.freed += bytes_

        return [
            *self.change(live, begun=1),
            *self.change(live, **gone),
            count,
            *self.change(live, changes=1, **{charge: -bytes_}),
        ]

    def make_context(self, live: Live) -> Action:
        return [
            *self.change(live, begun=1, overhead=CONTEXT),
            *self.change(live, contexts=1),
            *self.change(live, changes=1),
        ]

    def touch(self, live: Live, bytes_: int) -> Action:
        return self.change(live, resident=bytes_)

    # -- what outlives its process

    def orphan(self, live: Live, bytes_: int, ended: bool) -> None:
        """Charged to no process from now on."""
        key, now = (live.pid, live.generation), next(self.now)
        known = self.charged_orphans.get(key) or Orphan(live.pid, 0, live.generation, 0, 0, now, 0, (1,))
        ended_ns = now if ended else known.ended_ns
        if known.bytes + bytes_:
            self.charged_orphans[key] = replace(known, bytes=known.bytes + bytes_, ended_ns=ended_ns)

    def end(self, live: Live) -> tuple[Step, Ended]:
        """A step, and what the driver still has after it. The pid may be used again at once."""
        left = Ended(live.pid, 0, 0)

        def step() -> None:
            if self.live.get(live.pid) is not live:
                return
            self.freed += live.managed
            self.orphan(live, live.bytes(), ended=True)
            left.row, left.resident = live.row() if live.contexts else 0, live.resident
            if not live.contexts and live.handles:
                self.exported.append(live.handles)  # NVML names no process for it
            del self.live[live.pid]
            self.ended.append(left)

        return step, left

    def clean_up(self, left: Ended) -> Action:
        """The driver has let go of all that an ended process had."""

        def step() -> None:
            if left in self.ended:
                self.ended.remove(left)

        return [step]

    def export_and_free(self, live: Live, bytes_: int) -> Action:
        """A handle, which a descriptor keeps."""

        def give_up() -> None:
            if self.live.get(live.pid) is live:
                live.handles -= bytes_
                self.exported.append(bytes_)

        def settle() -> None:
            if self.live.get(live.pid) is live:
                live.charged -= bytes_
                self.orphan(live, bytes_, ended=False)
                live.changes += 1

        return [*self.change(live, begun=1), give_up, settle]

    def close_export(self, bytes_: int) -> Action:
        """The last descriptor, and nothing has imported it."""
        return [lambda: self.exported.remove(bytes_) if bytes_ in self.exported else None]

    def import_(self, live: Live, bytes_: int) -> Action:
        """The last descriptor is closed; from then on NVML shows the memory in the importer's row."""

        def step() -> None:
            if self.live.get(live.pid) is live and live.contexts and bytes_ in self.exported:
                self.exported.remove(bytes_)
                live.imported += bytes_

        return [*self.change(live, begun=1), step, *self.change(live, changes=1)]

    def close_import(self, live: Live) -> Action:
        return self.change(live, imported=-live.imported)

    def set_stranger(self, pid: int, plain: int | None) -> Action:
        """A process that is in no managed cgroup has so many bytes; None: it is gone."""

        def step() -> None:
            if plain is None:
                self.strangers.pop(pid, None)
            else:
                self.strangers.setdefault(pid, Stranger()).plain = plain

        return [step]

    # -- what the agent asks

    def _tick(self) -> None:
        step = next(self.between, None)
        if step:
            step()

    def rows(self) -> dict[int, int]:
        """NVML's."""
        found = {live.pid: live.row() for live in self.live.values() if live.contexts}
        for left in self.ended:
            if left.row:
                found[left.pid] = found.get(left.pid, 0) + left.row
        return found | {pid: CONTEXT + stranger.plain for pid, stranger in self.strangers.items()}

    def told(self, answer: Callable[[], Any]) -> Callable[..., Any]:
        """An answer, and whatever happens after it."""

        def ask(*_: object) -> Any:
            found = answer()
            self._tick()
            return found

        return ask

    def nvml(self) -> Any:
        return SimpleNamespace(
            devices=[SimpleNamespace(index=0)],
            process_bytes=self.told(self.rows),
            taken_bytes=self.told(self.in_use),
            process_percent=lambda *_: None,
        )

    def ledger(self) -> Any:
        return SimpleNamespace(
            processes=self.told(lambda: {pid: live.entry() for pid, live in self.live.items()}),
            process=lambda pid: self.live[pid].entry() if pid in self.live else None,
            processes_so_far=lambda: 0,
            context_bytes=lambda _: CONTEXT,
            mark=self._mark,
            overhead=self._set_overhead,
            raise_overhead=self._raise_overhead,
            move=lambda *_: True,
            orphans=SimpleNamespace(
                entries=self.told(lambda: list(self.charged_orphans.values())),
                managed_freed=self.told(lambda: self.freed),
                let_go=self._let_go,
                of_level=lambda _: first(self.orphaned()),
                disown=lambda *_: True,
            ),
        )

    def _mark(self, pid: int, generation: int, _: int) -> bool:
        live = self.live.get(pid)
        if live and live.generation == generation:
            live.peak = live.bytes()
        return bool(live)

    def _set_overhead(self, pid: int, generation: int, _: int, bytes_: int, changes: int) -> bool:
        live = self.live.get(pid)
        if not live or live.generation != generation or not live.begun == live.changes == changes:
            return False
        live.overhead = bytes_
        live.peak = max(live.peak, live.bytes())
        return True

    def _raise_overhead(self, pid: int, generation: int, _: int, more: int) -> bool:
        live = self.live.get(pid)
        if not live or live.generation != generation:
            return False
        live.overhead += more
        live.peak = max(live.peak, live.bytes())
        return True

    def _let_go(self, orphan: Orphan, bytes_: int) -> bool:
        key = orphan.tgid, orphan.generation
        known = self.charged_orphans.get(key)
        if not known:
            return False
        left = max(0, known.bytes - bytes_)
        if left:
            self.charged_orphans[key] = replace(known, bytes=left)
        else:
            del self.charged_orphans[key]
        return True

    def reconciler(self) -> Reconciler:
        return Reconciler(self.nvml(), self.ledger(), lambda _: (1,))
