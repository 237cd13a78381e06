"""A device as an H200 behaves, and a ledger as the kernel keeps it, in which operations may stand still at any point.

An operation of a process is a generator: at each `yield` other things may happen. NVML and the ledger are asked one
question at a time, and between two questions operations go on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from orphan_kit import MIB, ZEROES, first

from fgpu_ebpf.orphan_release import CONTEXT_REST_BYTES, DEVICE_REST_BYTES
from fgpu_ebpf.orphans import Orphan
from fgpu_ebpf.pages import Seen
from fgpu_ebpf.processes import Process

CONTEXT = 518 * MIB
LEVELS = (5,)

Operation = Iterator[None]


@dataclass(eq=False)
class Managed:
    """Managed memory; `resident`: so much of it is on the device."""

    bytes: int
    resident: int = 0


@dataclass(eq=False)
class Handle:
    """Memory of cuMemCreate. `descriptors`: of exports of it, which are open somewhere."""

    bytes: int
    maker: Client | None
    importers: list[Client] = field(default_factory=list)
    is_exported: bool = False
    descriptors: int = 0

    def named(self) -> Client | None:
        """In whose row it is, if that one has a context."""
        if self.maker:
            return self.maker
        return self.importers[-1] if self.importers and not self.descriptors else None


@dataclass(eq=False)
class Client:
    """A process that uses the driver, or what is left of one. `keepers`: others that have its descriptors open."""

    pid: int
    is_stranger: bool = False
    is_alive: bool = True
    keepers: int = 0
    contexts: int = 0
    plain: list[int] = field(default_factory=list)
    managed: list[Managed] = field(default_factory=list)
    pool: int = 0
    grown: int = 0  # stacks, modules: what only the driver knows

    def own_bytes(self) -> int:
        """On the device, but for handles and managed memory."""
        return self.contexts * CONTEXT + sum(self.plain) + self.pool + self.grown

    def resident(self) -> int:
        return sum(managed.resident for managed in self.managed)


class Device:
    """What a driver holds, and what NVML shows of it."""

    def __init__(self) -> None:
        self.clients: list[Client] = []
        self.handles: list[Handle] = []

    def rows(self) -> dict[int, int | None]:
        found: dict[int, int | None] = {}
        for client in self.clients:
            if client.contexts:
                handles = sum(handle.bytes for handle in self.handles if handle.named() is client)
                found[client.pid] = (found.get(client.pid) or 0) + client.own_bytes() + handles
        return found

    def in_use(self) -> int:
        contexts = sum(client.contexts for client in self.clients)
        rest = contexts * CONTEXT_REST_BYTES + DEVICE_REST_BYTES
        return rest + sum(self._bytes(client) for client in self.clients) + sum(h.bytes for h in self.handles)

    def _bytes(self, client: Client) -> int:
        return client.own_bytes() + client.resident()

    def of_tenants(self) -> int:
        """Bytes that tenants' processes hold or held, whatever NVML shows."""
        clients = sum(self._bytes(client) for client in self.clients if not client.is_stranger)
        return clients + sum(handle.bytes for handle in self.handles)

    def kept(self) -> int:
        """Bytes that outlive their processes, or that an exporter has released and others have open."""
        handles = sum(handle.bytes for handle in self.handles if self._outlives(handle))
        return handles + sum(self._bytes(c) for c in self.clients if not c.is_alive and not c.is_stranger)

    def _outlives(self, handle: Handle) -> bool:
        named = handle.named()
        return named is None or not named.is_alive

    def clean(self, client: Client) -> None:
        """The driver takes down a client of which no descriptor is open."""
        self.clients.remove(client)
        for handle in list(self.handles):
            if handle.maker is client:
                handle.maker = None
            handle.importers = [one for one in handle.importers if one is not client]
            self.free_unused(handle)

    def free_unused(self, handle: Handle) -> None:
        if not handle.maker and not handle.importers and not handle.descriptors:
            self.handles.remove(handle)


@dataclass
class Entry:
    """What the kernel has of a process."""

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
    ended: int = 0

    def process(self) -> Process:
        return Process(
            self.generation, LEVELS, Seen.SHIM | Seen.CALL, self.changes, self.begun == self.changes, first(self.bytes),
            first(self.overhead), first(self.managed), first(self.pool), first(self.contexts), False, self.begun, 0,
            ZEROES, first(self.ended), first(self.peak), first(self.vmm),
        )  # fmt: skip

    def charge(self, bytes_: int) -> None:
        self.bytes += bytes_
        self.peak = max(self.peak, self.bytes)


class Ledger:
    """The kernel's maps, and what the agent may do to them."""

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
            managed_freed=lambda _: self.freed,
        )
        self._between = between

    def total(self) -> int:
        """All that is charged."""
        return sum(entry.bytes for entry in self.entries.values()) + self.orphaned()

    def orphaned(self) -> int:
        return sum(orphan.bytes for orphan in self.kept.values())

    # -- what the kernel does

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

    # -- what the agent does

    def processes(self) -> dict[int, Process]:
        self._between()
        return {pid: entry.process() for pid, entry in self.entries.items()}

    def process(self, pid: int) -> Process | None:
        return self.entries[pid].process() if pid in self.entries else None

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

    def let_go(self, orphan: Orphan, bytes_: int) -> bool:
        key = orphan.tgid, orphan.generation
        if self.kept.get(key) != orphan:
            return False
        left = orphan.bytes - bytes_
        assert left >= 0
        del self.kept[key]
        if left:
            self.kept[key] = Orphan(*[left if name == "bytes" else getattr(orphan, name) for name in orphan.__slots__])
        return True

    def context_bytes(self, _: int) -> int:
        return CONTEXT

    def sweep(self) -> int:
        return 0

    def reap(self, pid: int, generation: int) -> None:
        raise AssertionError("every end was told")


class World:
    """A device and a ledger. `between` is called before each answer of NVML, and before processes are read."""

    def __init__(self, between: Callable[[], None]) -> None:
        self.device, self.ledger = Device(), Ledger(between)
        self.pids = itertools.count(1 << 23)
        self._between = between
        self.nvml = SimpleNamespace(
            devices=[SimpleNamespace(index=0)],
            process_bytes=self._rows,
            taken_bytes=self._in_use,
            used_bytes=lambda _: self.device.in_use(),
            process_percent=lambda *_: None,
            xids=list,
            watched=frozenset,
        )

    def _rows(self, _: int) -> Mapping[int, int | None]:
        self._between()
        return self.device.rows()

    def _in_use(self, _: int) -> int:
        self._between()
        return self.device.in_use()

    def is_alive(self, pid: int) -> bool:
        return any(client.pid == pid and client.is_alive for client in self.device.clients)

    def begin(self, pid: int | None = None, is_stranger: bool = False) -> Client:
        client = Client(next(self.pids) if pid is None else pid, is_stranger)
        self.device.clients.append(client)
        if not is_stranger:
            self.ledger.enter(client.pid)
        return client

    def end(self, client: Client, in_flight_managed: int, keepers: int) -> None:
        """The kernel is told at once; the driver takes its time."""
        if not client.is_stranger:
            self.ledger.end(client.pid, in_flight_managed)
        client.is_alive, client.keepers = False, keepers

    # -- operations

    def _entry(self, client: Client) -> Entry:
        return self.ledger.entries[client.pid]

    def take(self, client: Client, bytes_: int, succeeds: bool) -> Operation:
        entry = self._entry(client)
        entry.begun += 1
        entry.charge(bytes_)
        yield
        if succeeds:
            client.plain.append(bytes_)
        yield
        if not succeeds:
            entry.bytes -= bytes_
        entry.changes += 1

    def free(self, client: Client, bytes_: int) -> Operation:
        entry = self._entry(client)
        entry.begun += 1
        yield
        client.plain.remove(bytes_)
        yield
        entry.bytes -= bytes_
        entry.changes += 1

    def admit(self, client: Client, bytes_: int) -> Operation:
        """No call follows: it is overhead at last."""
        entry = self._entry(client)
        entry.begun += 1
        entry.charge(bytes_)
        yield
        entry.overhead += bytes_
        entry.changes += 1

    def take_managed(self, client: Client, bytes_: int) -> Operation:
        entry = self._entry(client)
        entry.begun += 1
        entry.charge(bytes_)
        yield
        client.managed.append(Managed(bytes_))
        yield
        entry.managed += bytes_
        entry.changes += 1

    def free_managed(self, client: Client, managed: Managed) -> Operation:
        entry = self._entry(client)
        entry.begun += 1
        yield
        client.managed.remove(managed)
        yield
        entry.bytes -= managed.bytes
        entry.managed -= managed.bytes
        self.ledger.freed += managed.bytes
        entry.changes += 1

    def create(self, client: Client, bytes_: int) -> Operation:
        entry = self._entry(client)
        entry.begun += 1
        entry.charge(bytes_)
        yield
        self.device.handles.append(Handle(bytes_, client))
        yield
        entry.vmm += bytes_
        entry.changes += 1

    def release(self, client: Client, handle: Handle) -> Operation:
        entry = self._entry(client)
        entry.begun += 1
        yield
        handle.maker = None
        self.device.free_unused(handle)
        yield
        entry.vmm -= handle.bytes
        entry.bytes -= handle.bytes
        if handle.is_exported:
            self.ledger.orphan(client.pid, entry, handle.bytes, False)
        entry.changes += 1

    def make_context(self, client: Client) -> Operation:
        entry = self._entry(client)
        entry.begun += 1
        entry.charge(CONTEXT)
        yield
        client.contexts += 1
        yield
        entry.overhead += CONTEXT
        entry.contexts += 1
        entry.changes += 1

    def end_context(self, client: Client) -> Operation:
        """The last one takes plain and managed memory along."""
        entry = self._entry(client)
        entry.begun += 1
        yield
        client.contexts -= 1
        if not client.contexts:
            client.plain, client.managed, client.grown = [], [], 0
        yield
        entry.contexts -= 1
        if entry.contexts:
            own = max(0, min(CONTEXT, entry.overhead))
            entry.ended += 1
            entry.overhead -= own
            entry.bytes -= own
        else:
            self.ledger.freed += entry.managed
            entry.overhead = entry.managed = 0
            entry.bytes = min(entry.bytes, entry.vmm + entry.pool)
        entry.changes += 1

    def admit_pool(self, client: Client, bytes_: int) -> None:
        entry = self._entry(client)
        entry.begun += 1
        entry.charge(bytes_)
        entry.pool += bytes_
        entry.changes += 1

    def give_back_pool(self, client: Client, bytes_: int) -> None:
        entry = self._entry(client)
        entry.begun += 1
        less = min(bytes_, entry.pool)
        entry.pool -= less
        entry.bytes -= less
        entry.changes += 1
