"""The ledger's pinned BPF maps: limits, usage pages, processes, allocations and counters.

The agent writes the maps, except `turns`, which the gatekeeper writes. Agent and gatekeeper read all maps. Only BPF
programs change the charges and the entries of processes. For such changes, agent and gatekeeper run the BPF program
`adjust`. Errors are LedgerMissing, and OSError of bpf(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.check import has_host_pids
from fgpu_ebpf.ledger.compute_maps import ComputeMaps
from fgpu_ebpf.ledger.level_limits import LevelLimits, new_page
from fgpu_ebpf.ledger.node_opens import NodeOpens
from fgpu_ebpf.ledger.orphans import OrphanMap
from fgpu_ebpf.ledger.owner_table import OwnerTable
from fgpu_ebpf.ledger.parked import ParkedMap
from fgpu_ebpf.ledger.probed_files import ProbedFiles
from fgpu_ebpf.ledger.process_entry import Process, process_of
from fgpu_ebpf.ledger.resolutions import Resolutions
from fgpu_ebpf.ledger.ring_buffer import Events
from fgpu_ebpf.ledger.usage_page_table import UsagePageTable
from fgpu_ebpf.ledger.usage_pages import Usage, UsagePages
from fgpu_ebpf.linux import bpf, procfs

PINS = Path(f"/sys/fs/bpf/fgpu/v{abi.LAYOUT}")
_U64, _U32 = struct.Struct("Q"), struct.Struct("I")
_ALLOCATION_KEY, _LEVEL = struct.Struct("IIQQ"), struct.Struct("QQ")
_ALLOCATION, _PROCESS = ctypes.sizeof(abi.Allocation), ctypes.sizeof(abi.Process)
_THREAD, _DEVICE = ctypes.sizeof(abi.Thread), ctypes.sizeof(abi.Device)
_LIMIT, _LIMIT_KEY = struct.Struct("QQ"), struct.Struct("QQ")
_COUNTER_KEY = struct.Struct("QIHH")
_ZERO = _U32.pack(0)
HOST_EPOCH, HOST_PROCESSES = 0, 5
SWEPT_AT_ONCE = 1024  # allocations
PAGES_AT_ONCE = 256  # created at a time; each page takes a descriptor until all are created
FEW = 24  # for up to this many processes, single lookups are faster than reading the whole map
MOVE_TRIES, MOVE_SECONDS = 20, 0.01


class LedgerMissing(Exception):
    """The maps are not pinned: the loader has not run."""


class Count(NamedTuple):
    """The key of a counter of a level.

    Cgroup 0 is the host. Reasons of the host are abi.Anomaly for the kind KINDS, and abi.Fate for the kind EVENTS.
    """

    cgroup: int
    device: int
    kind: int
    reason: int


class Ledger:
    """The pinned maps of one layout.

    Threads other than the thread that opens the ledger may call only file_check(), tenants(), context_bytes(), the
    methods for processes and allocations, the methods of `orphans`, and the methods of `times` that do not set shares.
    """

    def __init__(self, pins: Path = PINS) -> None:
        self._adjust = -1
        self._moving = threading.Lock()
        self._members: tuple[int, tuple[int, ...]] = (-1, ())  # processes_so_far() and the processes at that time
        self._maps: dict[str, int] = {}
        self._usage = UsagePages(self.page_fd)
        self._page_table = UsagePageTable(self._maps)
        self.times = ComputeMaps(self._maps, lambda: self._run(abi.Adjust.RING), pins / "maps")
        self.orphans = OrphanMap(self._maps, self._run, self.page_fd)
        self.owners, self.levels_taken = OwnerTable(self._maps, self._run), self._page_table.taken
        self.parked = ParkedMap(self._maps, self._run, self._moving)
        self.opens = NodeOpens(self._maps, self._run, self._usage)
        resolutions = self.resolutions = Resolutions(self._maps, self.new_epoch)
        self.resolution, self.resolved, self.resolve = (
            resolutions.resolution, resolutions.resolved, resolutions.resolve
        )  # fmt: skip
        self.not_managed, self.refuse, self.forget, self.unresolve = (
            resolutions.not_managed, resolutions.refuse, resolutions.forget, resolutions.unresolve
        )  # fmt: skip
        files = ProbedFiles(self._maps)
        self.file_check, self.enter_file = files.file_check, files.enter_file
        self.forget_file, self.forget_files = files.forget_file, files.forget_files
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
            raise LedgerMissing(f"no BPF maps of fgpu are pinned under {pins}: is `fgpu agent` running?") from error

    def close(self) -> None:
        """Close all descriptors. The maps stay pinned."""
        self._page_table.close()
        for fd in (*self._maps.values(), self._adjust):
            if fd >= 0:
                os.close(fd)
        self._maps.clear()
        self._usage.close()
        self._adjust = -1

    # -- tenants and groups

    def page_fd(self, cgroup: int) -> int | None:
        """Return a new descriptor of the level's usage page, which the caller closes; None: no page is frozen.

        Tenants get this descriptor. A page that is not frozen is not returned, because a process could write such a
        page.
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
        """Return whether the level has no page yet."""
        return bpf.inner_id(self._maps["pages"], _U64.pack(cgroup)) is None

    def tenants(self) -> dict[int, int]:
        """Return the cgroup ids of all levels that have a page, with the ids of the pages."""
        return {_U64.unpack(key)[0]: _U32.unpack(page)[0] for key, page in bpf.items(self._maps["pages"], 8, 4)}

    def usage(self, cgroup: int, devices: Iterable[int] = range(abi.DEVICES)) -> list[Usage] | None:
        """Return one Usage for each device of the level's page, or None if the level has no page."""
        return self._usage.read(cgroup, devices)

    def limit(self, cgroup: int, device: int) -> int | None:
        """Return the level's limit on a device in bytes; None: the level may not use the device."""
        raw = bpf.lookup(self._maps["limits"], _LIMIT_KEY.pack(cgroup, device), _LIMIT.size)
        return None if raw is None else int(_LIMIT.unpack(raw)[0])

    def limits(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield level, device, bytes and flags of every limit in force."""
        found = bpf.items(self._maps["limits"], _LIMIT_KEY.size, _LIMIT.size)
        yield from ((*_LIMIT_KEY.unpack(key), *_LIMIT.unpack(value)) for key, value in found)

    def set_limits(self, levels: Iterable[LevelLimits], over: Callable[[set[int]], object] | None = None) -> None:
        """Put limits in force, and create the pages of levels without a page. Existing pages keep their charges.

        Args:
            over: called, usually in another thread, once for each batch of at most PAGES_AT_ONCE new levels, with the
                cgroups of the batch, when every BPF program that found no page for these cgroups has ended.

        Raises:
            OSError: E2BIG: too few pages for so many levels; no level is changed.
        """
        levels = list(levels)
        new = [level for level in levels if self.page_missing(level.cgroup)]
        try:
            for at in range(0, len(new), PAGES_AT_ONCE):
                self._page_table.make([new_page(level) for level in new[at : at + PAGES_AT_ONCE]], over)
        except OSError:
            self._forget_pages([level.cgroup for level in new])
            raise
        is_new = {level.cgroup for level in new}
        for level in levels:
            self._write_limits(level, level.cgroup in is_new)
        for level in levels:
            code = self._run(abi.Adjust.PUBLISH, level.cgroup, level.flags)
            if code < 0:
                raise OSError(-code, f"cannot put a limit in force (BPF program adjust): {os.strerror(-code)}")

    def _write_limits(self, level: LevelLimits, is_new: bool) -> None:
        for device, bytes_ in level.bytes.items():
            key, limit = _LIMIT_KEY.pack(level.cgroup, device), _LIMIT.pack(bytes_, level.flags_of(device))
            bpf.update(self._maps["limits"], key, limit)
        for device in () if is_new else set(range(abi.DEVICES)) - level.bytes.keys():
            bpf.delete(self._maps["limits"], _LIMIT_KEY.pack(level.cgroup, device))

    def _forget_pages(self, cgroups: Collection[int]) -> None:
        for cgroup in cgroups:
            self._run(abi.Adjust.WITHDRAW, cgroup)
        self._page_table.take_away(cgroups, self._forget_counters)

    def _forget_counters(self, cgroups: Collection[int]) -> None:
        for count in [c for c in self.counters() if c.cgroup in cgroups and self.page_missing(c.cgroup)]:
            bpf.delete(self._maps["counters"], _COUNTER_KEY.pack(count.cgroup, count.device, count.kind, count.reason))

    def remove(self, cgroups: Collection[int]) -> None:
        """Remove levels with their pages, limits and counters. Their processes must have been moved or have exited."""
        for cgroup in cgroups:
            self._usage.forget(cgroup)
            for device in range(abi.DEVICES):
                bpf.delete(self._maps["limits"], _LIMIT_KEY.pack(cgroup, device))
        self._forget_pages(cgroups)
        self.times.forget(cgroups)
        self.unresolve(cgroups)

    # -- identity

    def epoch(self) -> int:
        """Return the epoch: a number that new_epoch() increments when decisions about cgroups have changed."""
        return self._number("host", HOST_EPOCH)

    def new_epoch(self) -> None:
        """Make every shim register again at its next call."""
        self._set_host(HOST_EPOCH, self.epoch() + 1)

    def _number(self, array: str, index: int) -> int:
        return bpf.number(self._maps[array], index)

    def _set_host(self, index: int, value: int) -> None:
        bpf.update(self._maps["host"], _U32.pack(index), _U64.pack(value))

    # -- devices

    def devices(self) -> list[tuple[int, bytes]]:
        """Return (ledger index, 16-byte UUID) of the host's devices."""
        found = []
        for index in range(abi.DEVICES):
            raw = bpf.lookup(self._maps["devices"], _U32.pack(index), _DEVICE) or bytes(_DEVICE)
            if any(raw[:16]):
                found.append((index, raw[:16]))
        return found

    def set_device(self, index: int, uuid: bytes) -> None:
        """Set the UUID of the device at a ledger index."""
        bpf.update(self._maps["devices"], _U32.pack(index), bytes(abi.Device((ctypes.c_uint8 * 16)(*uuid), index)))

    def context_bytes(self, device: int) -> int:
        """Return the bytes that are charged for a new context on this device until NVML reports its size."""
        return self._number("contexts", device)

    def set_context_bytes(self, device: int, bytes_: int) -> None:
        """Set the measured size of a context on a device, in bytes."""
        bpf.update(self._maps["contexts"], _U32.pack(device), _U64.pack(bytes_))

    # -- processes

    def processes(self) -> dict[int, Process]:
        """Return the entries of all processes, by tgid, except entries that a BPF program is still creating."""
        so_far, (as_of, known) = self._number("host", HOST_PROCESSES), self._members
        entries: Iterable[tuple[int, Process | None]]
        if so_far == as_of and len(known) <= FEW:  # no entry was added since that reading
            entries = ((tgid, self.process(tgid)) for tgid in known)
        else:
            found = bpf.items(self._maps["processes"], 4, _PROCESS)
            entries = ((_U32.unpack(key)[0], process_of(raw)) for key, raw in found)
        processes = {tgid: p for tgid, p in entries if p and p.generation}
        self._members = (so_far, tuple(processes))
        return processes

    def processes_so_far(self) -> int:
        """Return how many entries of processes were ever created."""
        return self._number("host", HOST_PROCESSES)

    def process(self, tgid: int) -> Process | None:
        """Return the entry of a process, or None."""
        raw = bpf.lookup(self._maps["processes"], _U32.pack(tgid), _PROCESS)
        return process_of(raw) if raw else None

    def overhead(self, tgid: int, generation: int, device: int, bytes_: int, changes: int) -> bool:
        """Set a process's overhead on a device.

        Args:
            changes: Process.changes of the reading from which the overhead was computed.

        Returns:
            False if the process has been charged or has exited since that reading. The caller must read the process
            again.
        """
        return self._run(abi.Adjust.OVERHEAD, tgid, generation, device, bytes_, changes) == 0

    def raise_overhead(self, tgid: int, generation: int, device: int, more: int) -> bool:
        """Add `more` bytes to the overhead of a process that is never idle. Return False if the process has exited."""
        return self._run(abi.Adjust.RAISE, tgid, generation, device, more) == 0

    def context_seen(self, tgid: int, generation: int, device: int, changes: int) -> bool:
        """Count the context of a process without a recorded context, because NVML lists the process.

        A context that is counted already is not counted again. `changes` and the result: as for overhead().
        """
        return self._run(abi.Adjust.CONTEXT_SEEN, tgid, generation, device, changes) == 0

    def context_gone(self, tgid: int, generation: int, device: int, changes: int) -> bool:
        """Stop counting a context without a recorded creation, because NVML does not list the process."""
        return self._run(abi.Adjust.CONTEXT_GONE, tgid, generation, device, changes) == 0

    def move(self, tgid: int, generation: int, levels: tuple[int, ...]) -> bool:
        """Move a process and its charges to other levels, innermost first.

        If `generation` is 0, a missing entry of the process is created. If the process has just been moved, the method
        tries again, for at most 0.2 s. Return False if the process was not moved. A parked process that was not moved
        is entered in `parked.unmoved`.
        """
        for _ in range(MOVE_TRIES):
            with self._moving:
                done = self._run(abi.Adjust.MOVE, tgid, generation, len(levels), *levels)
            if done != -errno.EAGAIN:
                break
            time.sleep(MOVE_SECONDS)
        if done == -errno.EBUSY:
            self.parked.unmoved.add(tgid)
        return done == 0

    def finish_move(self, tgid: int, generation: int) -> bool:
        """Move charges that the last move has missed, or delete an entry without levels. False: there is no entry."""
        with self._moving:
            return self._run(abi.Adjust.FINISH_MOVE, tgid, generation) == 0

    def reap(self, tgid: int, generation: int) -> bool:
        """End the entry of a process that has exited without an event. Return whether the entry existed."""
        return self._run(abi.Adjust.REAP, tgid, generation) == 0

    def mark(self, tgid: int, generation: int, device: int) -> bool:
        """Restart the peak of a process on a device. Return False if the process has exited."""
        return self._run(abi.Adjust.MARK, tgid, generation, device) == 0

    def enter(self, tgid: int, levels: tuple[int, ...]) -> Process | None:
        """Return the entry of a process. Create the entry if the process has no entry.

        The result None means that the requests of the process have no tag. The process's level or bound owner has too
        many entries, or the calling process runs in a pid namespace with pids of its own.
        """
        if not has_host_pids():
            return None
        self._run(abi.Adjust.ENTER, tgid, 0, len(levels), *levels)
        return self.process(tgid)

    @property
    def event_budgets(self) -> int:
        """The descriptor of the map `event_budgets`."""
        return self._maps["event_budgets"]

    def events(self) -> Events:
        """Return a reader of the kernel's rare events. Only one reader may exist, because each event is read once."""
        return Events(os.dup(self._maps["events"]))

    def sweep(self) -> int:
        """Delete allocations whose process has exited or executed another program, and return their number."""
        allocations, lives, swept = self._maps["allocations"], dict[tuple[int, int], bool](), 0
        found = bpf.items(allocations, _ALLOCATION_KEY.size, _ALLOCATION, SWEPT_AT_ONCE)
        while some := list(islice(found, SWEPT_AT_ONCE)):
            gone = defaultdict[tuple[int, int], list[bytes]](list)  # by level
            for raw_key, raw in some:
                tgid, _, generation, _ = _ALLOCATION_KEY.unpack(raw_key)
                if (tgid, generation) not in lives:
                    owner = self.process(tgid)
                    lives[tgid, generation] = owner is not None and owner.generation == generation
                if not lives[tgid, generation]:
                    gone[_LEVEL.unpack_from(raw, abi.Allocation.level.offset)].append(raw_key)
            for (cgroup, place), keys in gone.items():
                n = bpf.delete_all(allocations, keys)
                self._run(abi.Adjust.SWEPT, cgroup, n, place)
                swept += n
        return swept

    def entries(self, name: str) -> int:
        """Return how many entries a map has, for checks and tests."""
        of = {"allocations": (_ALLOCATION_KEY.size, _ALLOCATION), "processes": (4, _PROCESS), "threads": (8, _THREAD)}
        return sum(1 for _ in bpf.items(self._maps[name], *of[name], 1024))

    def incidents(self, kind: abi.Kind, reason: int) -> int:
        """Return how often an anomaly (kind KINDS) or a fate of an event (kind EVENTS) has occurred on the host."""
        return self._number("incidents", (kind - abi.Kind.KINDS) * abi.REASONS + reason)

    def counters(self) -> dict[Count, int]:
        """Return all counters that are not 0: refusals, anomalies, and events that were sent or lost."""
        found = bpf.items(self._maps["counters"], _COUNTER_KEY.size, 8)
        counted = {Count(*_COUNTER_KEY.unpack(key)): _U64.unpack(value)[0] for key, value in found}
        kinds = abi.Kind.KINDS, abi.Kind.EVENTS
        host = {Count(0, 0, kind, n): self.incidents(kind, n) for kind in kinds for n in range(abi.REASONS)}
        return {count: n for count, n in (counted | host).items() if n}

    def hits(self) -> list[int]:
        """Return how often each probe ran: by abi.Function, and from abi.HIT_ADMIT on the probes of the shim."""
        size = 8 * procfs.possible_processors()
        found = {_U32.unpack(key)[0]: value for key, value in bpf.items(self._maps["hits"], 4, size)}
        return [sum(struct.unpack(f"{len(found[n]) // 8}Q", found[n])) for n in range(abi.HITS)]

    def _run(self, *arguments: int) -> int:
        """Run the BPF program `adjust` with these arguments, padded with zeros to 12. Return its result or -errno."""
        return bpf.run_raw_tracepoint(self._adjust, *arguments, *[0] * (12 - len(arguments)))
