"""A device that behaves as an H200, and operations of processes that may stop at any point.

An operation of a process is a generator: at each `yield`, other operations may run. The reconcile thread reads one
figure of NVML or of the ledger at a time, and operations continue between two reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

from fgpu_ebpf.agent.orphan_release import CONTEXT_REST_BYTES, DEVICE_REST_BYTES
from tests.unit.agent.ledger_kit import CONTEXT, Entry, Ledger

Operation = Iterator[None]


@dataclass(eq=False)
class Managed:
    """Managed memory. `resident` is the number of its bytes that are on the device."""

    bytes: int
    resident: int = 0


@dataclass(eq=False)
class Handle:
    """Memory of cuMemCreate. `descriptors` is the number of its exported descriptors that are open."""

    bytes: int
    maker: Client | None
    importers: list[Client] = field(default_factory=list)
    is_exported: bool = False
    descriptors: int = 0

    def named(self) -> Client | None:
        """Return the client whose row of NVML includes this memory, if that client has a context."""
        if self.maker:
            return self.maker
        return self.importers[-1] if self.importers and not self.descriptors else None


@dataclass(eq=False)
class Client:
    """A process that uses the driver, or an exited process with memory that the driver still holds.

    `keepers` is the number of other processes that have its descriptors of the driver open.
    """

    pid: int
    is_stranger: bool = False
    is_alive: bool = True
    keepers: int = 0
    contexts: int = 0
    is_ending_context: bool = False
    plain: list[int] = field(default_factory=list)
    managed: list[Managed] = field(default_factory=list)
    pool: int = 0
    grown: int = 0  # bytes of stacks and modules, which only the driver counts
    never_seen: int = 0  # of an exited process: bytes that were never charged, because NVML was not read in time

    def own_bytes(self) -> int:
        """Return the bytes on the device, without handles and managed memory."""
        return self.contexts * CONTEXT + sum(self.plain) + self.pool + self.grown

    def resident(self) -> int:
        return sum(managed.resident for managed in self.managed)


class Device:
    """The memory that a driver holds, and the rows that NVML shows of it."""

    def __init__(self) -> None:
        self.clients: list[Client] = []
        self.handles: list[Handle] = []

    def rows(self) -> dict[int, int | None]:
        found: dict[int, int | None] = {}
        for client in self.clients:
            if client.contexts:
                found[client.pid] = (found.get(client.pid) or 0) + self.in_row(client)
        return found

    def in_row(self, client: Client) -> int:
        """Return the bytes in the row of a client that has a context."""
        return client.own_bytes() + sum(handle.bytes for handle in self.handles if handle.named() is client)

    def in_use(self) -> int:
        contexts = sum(client.contexts for client in self.clients)
        rest = contexts * CONTEXT_REST_BYTES + DEVICE_REST_BYTES
        return rest + sum(self._bytes(client) for client in self.clients) + sum(h.bytes for h in self.handles)

    def _bytes(self, client: Client) -> int:
        return client.own_bytes() + client.resident()

    def in_no_row(self, client: Client) -> int:
        """Return the bytes of a living client in no row: managed memory, or everything if it has no context."""
        return client.is_alive * (client.resident() + (0 if client.contexts else self.in_row(client)))

    def pools_in_no_row(self) -> int:
        """Return the pool bytes that are in no row and that the reconciler cannot estimate."""
        return sum(client.pool for client in self.clients if client.is_alive and not client.contexts)

    def of_tenants(self) -> int:
        """Return the bytes that tenants' processes hold or held, also those that NVML does not show."""
        clients = sum(self._bytes(client) for client in self.clients if not client.is_stranger)
        return clients + sum(handle.bytes for handle in self.handles)

    def kept(self) -> int:
        """Return the bytes of exited tenants' processes, and of freed exported handles without a charge."""
        handles = sum(handle.bytes for handle in self.handles if self._outlives(handle))
        return handles + sum(self._bytes(c) for c in self.clients if not c.is_alive and not c.is_stranger)

    def _outlives(self, handle: Handle) -> bool:
        named = handle.named()
        return named is None or not named.is_alive or not (handle.maker or named.contexts)

    def clean(self, client: Client) -> None:
        """Free the memory that the driver frees for a client without open descriptors."""
        self.clients.remove(client)
        for handle in list(self.handles):
            if handle.maker is client:
                handle.maker = None
            handle.importers = [one for one in handle.importers if one is not client]
            self.free_unused(handle)

    def free_unused(self, handle: Handle) -> None:
        if not handle.maker and not handle.importers and not handle.descriptors:
            self.handles.remove(handle)


class World:
    """A device and a ledger. `between` is called before each read of NVML's rows, of bytes in use and of processes."""

    def __init__(self, between: Callable[[], None]) -> None:
        self.device, self.ledger = Device(), Ledger(between)
        self.pids = itertools.count(1 << 23)
        self._between = between
        self.nvml = SimpleNamespace(
            devices=[SimpleNamespace(index=0)],
            process_bytes=self._rows,
            taken_bytes=self._in_use,
            used_bytes=lambda _: self.device.in_use(),
            in_mig_mode=lambda _: False,
            process_percent=lambda *_: None,
            xids=list,
            watched=frozenset,
            look_for_missing=lambda: None,
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
        """Exit the client's process. The kernel records the exit at once, the driver some time later."""
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
        """Admit bytes without a call of the driver. In the end they count as overhead."""
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

    def import_(self, client: Client, handle: Handle) -> None:
        handle.importers.append(client)
        self._entry(client).has_imported = True

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
        """End a context. The last context frees plain and managed memory too."""
        entry = self._entry(client)
        entry.begun += 1
        client.is_ending_context = True
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
            entry.managed = 0
            less = max(0, entry.bytes - entry.vmm - entry.pool)
            entry.bytes -= less
            if entry.has_imported:
                self.ledger.orphan(client.pid, entry, less, False)
            entry.pool = min(entry.pool, max(0, entry.bytes - entry.vmm))
            entry.overhead = entry.bytes - entry.vmm - entry.pool
        client.is_ending_context = False
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
        uncharged = min(less, max(0, entry.contexts * CONTEXT - entry.overhead))
        entry.pool -= less
        entry.overhead += uncharged
        entry.bytes -= less - uncharged
        entry.changes += 1
