"""The ledger's pinned maps, as the agent writes and everybody reads them.

Owns: what each map's keys and values mean. Never: decides a limit, or adds to `used`: BPF programs alone do, one of
them (`adjust`) on the agent's word. On failure: LedgerMissing before the loader has run; OSError of bpf(2) else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import operator
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf import bpf, pages
from fgpu_ebpf.checks import has_host_pids
from fgpu_ebpf.events import Events
from fgpu_ebpf.orphans import OrphanMap
from fgpu_ebpf.owner_table import OwnerTable
from fgpu_ebpf.processes import Process, process_of
from fgpu_ebpf.resolutions import Resolutions
from fgpu_ebpf.shelf import Shelf
from fgpu_ebpf.timebook import Timebook
from fgpu_ebpf.usage import Usage, UsagePages

PINS = Path(f"/sys/fs/bpf/fgpu/v{pages.LAYOUT}")
_U64 = struct.Struct("Q")
_U32 = struct.Struct("I")
_ALLOCATION_KEY = ctypes.sizeof(pages.AllocationKey)
_ALLOCATION = ctypes.sizeof(pages.Allocation)
_PROCESS = ctypes.sizeof(pages.Process)
_THREAD = ctypes.sizeof(pages.Thread)
_LIMIT, _LIMIT_KEY = struct.Struct("QQ"), struct.Struct("QQ")
_COUNTER_KEY = struct.Struct("QIHH")
_FILE = struct.Struct("QQ")
_DEVICE = ctypes.sizeof(pages.Device)
_ZERO = _U32.pack(0)
HOST_EPOCH, HOST_FLAGS, HOST_PROCESSES = 0, 1, 5
PAGES_AT_ONCE = 256  # each takes a descriptor meanwhile
FEW = 24  # processes that are looked up faster than a map is walked
MOVE_TRIES, MOVE_SECONDS = 20, 0.01


class LedgerMissing(Exception):
    """The maps are not pinned: the loader has not run."""


@dataclass(frozen=True, slots=True)
class LevelLimits:
    """What a level may hold: bytes per ledger index; an index left out is denied. `flags` are pages.LimitFlag, `owner`
    is the slot of the owner of its bounds. `uncommitted`: devices on which the limit does not count yet.
    """

    cgroup: int
    bytes: Mapping[int, int]
    flags: int = 0
    owner: int = 0
    uncommitted: Set[int] = frozenset()

    def flags_of(self, device: int) -> int:
        """Of the limit on one device."""
        return self.flags | (pages.uncommitted(device) if device in self.uncommitted else 0)


@dataclass(frozen=True, slots=True)
class Count:
    """What is counted: of a level; or cgroup 0, of the host: of kind KINDS an anomaly, of kind EVENTS a fate."""

    cgroup: int
    device: int
    kind: int
    reason: int


class Ledger:
    """The pinned maps of one layout. For one thread, except `processes`, `overhead`, `move` and `orphans`."""

    def __init__(self, pins: Path = PINS) -> None:
        self._adjust = -1
        self._moving = threading.Lock()
        self._members: tuple[int, tuple[int, ...]] = (-1, ())  # as of how many so far
        self._maps: dict[str, int] = {}
        self._usage = UsagePages(self.page_fd)
        self._shelf = Shelf(self._maps)
        self.times = Timebook(self._maps, lambda: self._run(pages.Adjust.RING), pins / "maps")
        self.orphans = OrphanMap(self._maps, self._run, self.page_fd)
        self.owners, self.levels_taken = OwnerTable(self._maps, self._run), self._shelf.taken
        told = self.resolutions = Resolutions(self._maps, self.new_epoch)
        self.resolution, self.resolved, self.resolve = told.resolution, told.resolved, told.resolve
        self.not_managed, self.refuse, self.forget, self.unresolve = (
            told.not_managed, told.refuse, told.forget, told.unresolve
        )  # fmt: skip
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._open(pins)
            undo.pop_all()

    def _open(self, pins: Path) -> None:
        try:
            for path in (pins / "maps").iterdir():
                self._maps[path.name] = bpf.pinned(path)
            self._adjust = bpf.pinned(pins / "programs" / "adjust")
        except FileNotFoundError as error:
            raise LedgerMissing(f"no ledger under {pins}: is `fgpu agent` running?") from error

    def close(self) -> None:
        """Closes every descriptor; what is pinned stays."""
        self._shelf.close()
        for fd in (*self._maps.values(), self._adjust):
            if fd >= 0:
                os.close(fd)
        self._maps.clear()
        self._usage.close()
        self._adjust = -1

    # -- tenants and groups

    def page_fd(self, cgroup: int) -> int | None:
        """A new descriptor of the level's usage page; the caller closes it. None: there is none that nobody can write.

        It goes to the tenant, so what it could do with that is looked at here.
        """
        page = bpf.inner_id(self._maps["pages"], _U64.pack(cgroup))
        if page is None:
            return None
        fd = bpf.map_by_id(page)
        if bpf.frozen(fd):
            return fd
        os.close(fd)
        return None

    def page_missing(self, cgroup: int) -> bool:
        """The level has no page yet."""
        return bpf.inner_id(self._maps["pages"], _U64.pack(cgroup)) is None

    def tenants(self) -> list[int]:
        """Cgroup ids of every level that has a page."""
        return [_U64.unpack(key)[0] for key, _ in bpf.items(self._maps["pages"], 8, 4)]

    def usage(self, cgroup: int, devices: Iterable[int] = range(pages.DEVICES)) -> list[Usage] | None:
        """One Usage per device of the level's page; None where it has none."""
        return self._usage.read(cgroup, devices)

    def limit(self, cgroup: int, device: int) -> int | None:
        """The level's limit on a device in bytes; None: the level may not use it."""
        raw = bpf.lookup(self._maps["limits"], _LIMIT_KEY.pack(cgroup, device), _LIMIT.size)
        return None if raw is None else int(_LIMIT.unpack(raw)[0])

    def limits(self) -> Iterator[tuple[int, int, int, int]]:
        """Level, device, bytes and flags of every limit in force."""
        found = bpf.items(self._maps["limits"], _LIMIT_KEY.size, _LIMIT.size)
        yield from ((*_LIMIT_KEY.unpack(key), *_LIMIT.unpack(value)) for key, value in found)

    def set_limits(self, levels: Iterable[LevelLimits], over: Callable[[set[int]], object] | None = None) -> None:
        """Puts limits in force, at all these levels. Raises OSError: E2BIG, there is no room for so many levels; none
        of them is changed then.

        Makes the page of a level that has none. Charges stand in the page alone, so none is lost. `over` is told of
        new levels, on another thread, when nobody is any more in the middle of finding that they are none.
        """
        levels = list(levels)
        new = [level for level in levels if self.page_missing(level.cgroup)]
        try:
            for at in range(0, len(new), PAGES_AT_ONCE):
                self._shelf.make([_new_page(level) for level in new[at : at + PAGES_AT_ONCE]], over)
        except OSError:
            self._forget_pages([level.cgroup for level in new])
            raise
        is_new = {level.cgroup for level in new}
        for level in levels:
            self._write_limits(level, level.cgroup in is_new)
        for level in levels:
            code = self._run(pages.Adjust.PUBLISH, level.cgroup)
            if code < 0:
                raise OSError(-code, f"adjust(publish): {os.strerror(-code)}")

    def _write_limits(self, level: LevelLimits, is_new: bool) -> None:
        for device, bytes_ in level.bytes.items():
            key, limit = _LIMIT_KEY.pack(level.cgroup, device), _LIMIT.pack(bytes_, level.flags_of(device))
            bpf.update(self._maps["limits"], key, limit)
        for device in () if is_new else set(range(pages.DEVICES)) - level.bytes.keys():
            bpf.delete(self._maps["limits"], _LIMIT_KEY.pack(level.cgroup, device))

    def _forget_pages(self, cgroups: Collection[int]) -> None:
        for cgroup in cgroups:
            self._run(pages.Adjust.WITHDRAW, cgroup)
        self._shelf.take_away(cgroups, self._forget_counters)

    def _forget_counters(self, cgroups: Collection[int]) -> None:
        for count in [c for c in self.counters() if c.cgroup in cgroups and self.page_missing(c.cgroup)]:
            bpf.delete(self._maps["counters"], _COUNTER_KEY.pack(count.cgroup, count.device, count.kind, count.reason))

    def remove(self, cgroups: Collection[int]) -> None:
        """Forgets levels: pages, limits and counters. Their processes must have been moved or be gone."""
        for cgroup in cgroups:
            self._usage.forget(cgroup)
            for device in range(pages.DEVICES):
                bpf.delete(self._maps["limits"], _LIMIT_KEY.pack(cgroup, device))
        self._forget_pages(cgroups)
        self.times.forget(cgroups)
        self.unresolve(cgroups)

    # -- identity

    def epoch(self) -> int:
        """Changes whenever `resolved` does."""
        return self._number("host", HOST_EPOCH)

    def new_epoch(self) -> None:
        """Every shim says hello again at its next call."""
        self._set_host(HOST_EPOCH, self.epoch() + 1)

    def settle(self) -> bool:
        """This kernel has no return probes: shims settle their admissions themselves."""
        return bool(self._number("host", HOST_FLAGS) & pages.ControlFlag.SETTLE)

    def _number(self, array: str, index: int) -> int:
        return bpf.number(self._maps[array], index)

    def _set_host(self, index: int, value: int) -> None:
        bpf.update(self._maps["host"], _U32.pack(index), _U64.pack(value))

    def file_check(self, dev: int, ino: int) -> int | None:
        """The file offset of a probed instruction, 1 where it is not known; None: the file is not probed.

        Safe to call from any thread.
        """
        raw = bpf.lookup(self._maps["files"], _FILE.pack(dev, ino), 4)
        return None if raw is None else int(_U32.unpack(raw)[0])

    def enter_file(self, dev: int, ino: int, check: int = 1) -> None:
        """Records a file as probed; `check` is the file offset of a probed instruction, 1 where it is not known."""
        bpf.update(self._maps["files"], _FILE.pack(dev, ino), _U32.pack(check))

    def forget_file(self, dev: int, ino: int) -> None:
        """The file is no longer probed."""
        bpf.delete(self._maps["files"], _FILE.pack(dev, ino))

    def forget_files(self) -> None:
        """No file is probed any more."""
        for key, _ in bpf.items(self._maps["files"], _FILE.size, 4):
            bpf.delete(self._maps["files"], key)

    # -- devices

    def devices(self) -> list[tuple[int, bytes]]:
        """(ledger index, 16-byte UUID) of the host's devices."""
        found = []
        for index in range(pages.DEVICES):
            raw = bpf.lookup(self._maps["devices"], _U32.pack(index), _DEVICE) or bytes(_DEVICE)
            if any(raw[:16]):
                found.append((index, raw[:16]))
        return found

    def set_device(self, index: int, uuid: bytes) -> None:
        """Names the device at a ledger index."""
        bpf.update(self._maps["devices"], _U32.pack(index), bytes(pages.Device((ctypes.c_uint8 * 16)(*uuid), index)))

    def context_bytes(self, device: int) -> int:
        """What a new context on this device is charged until NVML says better."""
        return self._number("contexts", device)

    def set_context_bytes(self, device: int, bytes_: int) -> None:
        """Enters the size of a context, as last measured."""
        bpf.update(self._maps["contexts"], _U32.pack(device), _U64.pack(bytes_))

    # -- processes

    def processes(self) -> dict[int, Process]:
        """All entries that are ready: tgid -> Process."""
        so_far, (as_of, known) = self._number("host", HOST_PROCESSES), self._members
        entries: Iterable[tuple[int, Process | None]]
        if so_far == as_of and len(known) <= FEW:  # nobody has come
            entries = ((tgid, self.process(tgid)) for tgid in known)
        else:
            found = bpf.items(self._maps["processes"], 4, _PROCESS)
            entries = ((_U32.unpack(key)[0], process_of(raw)) for key, raw in found)
        processes = {tgid: p for tgid, p in entries if p and p.generation}
        self._members = (so_far, tuple(processes))
        return processes

    def processes_so_far(self) -> int:
        """How many entries there have ever been."""
        return self._number("host", HOST_PROCESSES)

    def process(self, tgid: int) -> Process | None:
        """One process's entry, or None."""
        raw = bpf.lookup(self._maps["processes"], _U32.pack(tgid), _PROCESS)
        return process_of(raw) if raw else None

    def overhead(self, tgid: int, generation: int, device: int, bytes_: int, changes: int) -> bool:
        """Sets what NVML alone knows of a process; False where it was charged or ended meanwhile: ask again."""
        return self._run(pages.Adjust.OVERHEAD, tgid, generation, device, bytes_, changes) == 0

    def raise_overhead(self, tgid: int, generation: int, device: int, more: int) -> bool:
        """Adds to what NVML alone knows of a process that is never quiet; False where it ended meanwhile."""
        return self._run(pages.Adjust.RAISE, tgid, generation, device, more) == 0

    def move(self, tgid: int, generation: int, levels: tuple[int, ...]) -> bool:
        """Moves a process and its charges to other levels, leaf first; generation 0 adopts an unknown one.

        Waits where its last move was only just; to the same levels, it shifts what was late for that.
        """
        for _ in range(MOVE_TRIES):
            with self._moving:
                done = self._run(pages.Adjust.MOVE, tgid, generation, len(levels), *levels)
            if done != -errno.EAGAIN:
                break
            time.sleep(MOVE_SECONDS)
        return done == 0

    def reap(self, tgid: int, generation: int) -> bool:
        """Ends a process of whose end the kernel said nothing."""
        return self._run(pages.Adjust.REAP, tgid, generation) == 0

    def mark(self, tgid: int, generation: int, device: int) -> bool:
        """Lets the peak of a process on a device begin anew; False where the process has ended."""
        return self._run(pages.Adjust.MARK, tgid, generation, device) == 0

    def tag(self, tgid: int, levels: tuple[int, ...]) -> int:
        """The tag in the kernel's answers to a process, whose entry is made where it has none.

        0: its level has as many entries as it may have, or the kernel's pids are not ours; it asks without a tag.
        """
        if not has_host_pids():
            return 0
        self._run(pages.Adjust.ENTER, tgid, 0, len(levels), *levels)
        process = self.process(tgid)
        return process.tag if process else 0

    def events(self) -> Events:
        """A reader of the kernel's rare events; there should be one."""
        return Events(os.dup(self._maps["events"]))

    def sweep(self) -> int:
        """Deletes allocations whose process or era is gone; answers how many."""
        processes, swept = self.processes(), Counter[tuple[int, int]]()
        for raw_key, raw in bpf.items(self._maps["allocations"], _ALLOCATION_KEY, _ALLOCATION, 1024):
            key = pages.AllocationKey.from_buffer_copy(raw_key)
            owner = processes.get(key.tgid) or self.process(key.tgid)
            if owner is None or owner.generation != key.generation:
                level = pages.Allocation.from_buffer_copy(raw).level
                swept[level.cgroup, level.place] += bpf.delete(self._maps["allocations"], raw_key)
        for (cgroup, place), n in swept.items():
            self._run(pages.Adjust.SWEPT, cgroup, n, place)
        return swept.total()

    def entries(self, name: str) -> int:
        """How many entries a map holds: for checks and tests."""
        sizes = {"allocations": (_ALLOCATION_KEY, _ALLOCATION), "processes": (4, _PROCESS), "threads": (8, _THREAD)}
        return sum(1 for _ in bpf.items(self._maps[name], *sizes[name], 1024))

    def incidents(self, kind: pages.Kind, reason: int) -> int:
        """How often that has happened on the host: an anomaly of pages.Kind.KINDS, or what came of EVENTS."""
        return self._number("incidents", (kind - pages.Kind.KINDS) * pages.REASONS + reason)

    def counters(self) -> dict[Count, int]:
        """Refusals and anomalies, counted in the kernel."""
        found = bpf.items(self._maps["counters"], _COUNTER_KEY.size, 8)
        counted = {Count(*_COUNTER_KEY.unpack(key)): _U64.unpack(value)[0] for key, value in found}
        kinds = pages.Kind.KINDS, pages.Kind.EVENTS
        host = {Count(0, 0, kind, n): self.incidents(kind, n) for kind in kinds for n in range(pages.REASONS)}
        return {count: n for count, n in (counted | host).items() if n}

    def hits(self) -> list[int]:
        """How often each probe ran, on all processors: by pages.Function, the shim's at pages.HIT_ADMIT and after."""
        size = 8 * bpf.possible_processors()
        found = {_U32.unpack(key)[0]: value for key, value in bpf.items(self._maps["hits"], 4, size)}
        return [sum(struct.unpack(f"{len(found[n]) // 8}Q", found[n])) for n in range(pages.HITS)]

    def _run(self, *arguments: int) -> int:
        """Runs `adjust`, which reads arguments that were not given as 0; answers 0 or -errno."""
        return bpf.run_raw_tracepoint(self._adjust, *arguments, *[0] * (12 - len(arguments)))


def _new_page(level: LevelLimits) -> pages.UsagePage:
    flags = functools.reduce(operator.or_, map(level.flags_of, level.bytes), level.flags)
    page = pages.UsagePage(version=pages.LAYOUT, cgroup=level.cgroup, flags=flags, owner=level.owner)
    for device, limit in level.bytes.items():  # 0 would deny
        page.devices[device].limit = limit
    return page
