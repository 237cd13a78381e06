"""The managed processes: their control and status pages, the rows and heartbeats shown there.

Owns: every control and status page, from a process's first answer to its end, which its pidfd tells; a few control
pages that all unmanaged processes share, so that none of those takes a place. Never: decides which process gets which
page, reads what a tenant wrote. When it fails: OSError; pages that no longer beat open shims' gates.
"""

from __future__ import annotations

import os
import resource
import selectors
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import monotonic_ns

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.processes import Process
from fgpu_ebpf.sealed import ControlMemory, StatusMemory, row_bytes

MOST_PROCESSES, PROCESSES_PER_OWNER = 8192, 1024
MOST_CLOCKS = 16  # of unmanaged processes
FEW_PROCESSES = 64  # half of all places are kept for owners that have no more
Held = tuple[int, int, int, int]  # tgid, generation, device, bytes


@dataclass(frozen=True, slots=True)
class Head:
    """What does not change on a control page: another head, another page."""

    flags: int = 0
    devices: tuple[tuple[int, bytes], ...] = ()


@dataclass(slots=True, eq=False)
class Client:
    """A process that has pages, for as long as its pidfd says that it lives. `since_ns`: it did so then."""

    pid: int
    pidfd: int
    tenant: int
    owner: int  # of its bounds: the cgroup whose place it takes
    space: int  # inode of its pid namespace
    head: Head
    control: ControlMemory
    status: StatusMemory | None = None
    rows: bytes = b""
    levels: tuple[int, ...] = ()  # leaf first
    since_ns: int = field(default_factory=monotonic_ns)
    has_ended: bool = False  # though its pidfd does not say so yet
    ahead_ns: int = 0  # of our clock: all times on its pages are by its own
    generation: int = 0  # of its entry in the ledger; 0: it had none yet

    def show(self, rows: bytes) -> None:
        """Put these rows on the control page, unless they stand there."""
        if rows != self.rows:
            self.control.show(rows)
            self.rows = rows

    def beat(self) -> None:
        """One heartbeat on the control page."""
        self.control.page.heartbeat_ns = monotonic_ns() + self.ahead_ns

    def close(self) -> None:
        """Give pidfd and pages back; what was handed out stays readable."""
        os.close(self.pidfd)
        self.control.close()
        if self.status:
            self.status.close()


class Clients:
    """All clients of one gatekeeper; `epoch` is what their pages say from now on."""

    def __init__(self, selector: selectors.BaseSelector, boot: bytes) -> None:
        self._selector, self._boot = selector, boot
        self._most = min(MOST_PROCESSES, max(16, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 3072) // 5))
        self._clients: dict[int, Client] = {}  # by pid, which is theirs while we hold the pidfd
        self._members: Counter[int] = Counter()  # clients of an owner
        self._held: dict[int, list[Held]] = {}
        self._names: dict[tuple[int, int], dict[int, int]] = {}
        self._tables: dict[tuple[int, int], bytes] = {}  # rows of a tenant, as a pid namespace names them
        self._shared: dict[int | None, ControlMemory] = {}  # by how far the clock is ahead of ours
        self.epoch = 0
        self.parted: Callable[[Client], None] = lambda _: None  # is told of everyone who has gone, once or twice

    def __len__(self) -> int:
        return len(self._clients)

    def get(self, pid: int) -> Client | None:
        """The client of this pid, if it lives."""
        client = self._clients.get(pid)
        if client and not procfs.alive(client.pidfd):
            self._bury(client)
            return None
        return client

    def enrol(self, pid: int, pidfd: int, tenant: int, owner: int, head: Head) -> Client | None:
        """A new client, which takes the pidfd over; None: it has no place. Raises OSError, the pidfd not taken."""
        if not self._has_place(owner):
            return None
        client = Client(pid, pidfd, tenant, owner, procfs.pid_space(pidfd), head, self._control(head))
        try:
            self._selector.register(pidfd, selectors.EVENT_READ, partial(self._bury, client))
        except OSError:
            client.control.close()
            raise
        self._clients[pid] = client
        self._members[owner] += 1
        return client

    def _has_place(self, owner: int) -> bool:
        own, taken = self._members[owner], len(self._clients)
        if own >= PROCESSES_PER_OWNER or taken >= self._most:
            return False
        return own < FEW_PROCESSES or taken < self._most // 2

    def page_of_unmanaged(self, pid: int) -> ControlMemory:
        """The control page that this process shares with all unmanaged ones of the same clock. Raises OSError.

        For a clock that is one too many there is a page without a heartbeat: to its processes the gatekeeper seems to
        have ended, and they say hello again and again.
        """
        ahead_ns: int | None = procfs.clock_ahead_ns(pid)
        if ahead_ns not in self._shared and len(self._shared) >= MOST_CLOCKS:
            ahead_ns = None
        if ahead_ns not in self._shared:
            self._shared[ahead_ns] = self._control(Head())
        self._beat_shared(self._shared[ahead_ns], ahead_ns)  # never behind the answer
        return self._shared[ahead_ns]

    def _beat_shared(self, control: ControlMemory, ahead_ns: int | None) -> None:
        control.page.epoch = self.epoch
        if ahead_ns is not None:
            control.page.heartbeat_ns = monotonic_ns() + ahead_ns

    def release(self, pid: int) -> None:
        """This process is unmanaged from now on: it has no pages of its own any more, and its gates are open."""
        client = self._clients.get(pid)
        if client:
            client.control.page.gates[:] = [pages.Gate.OPEN] * pages.DEVICES
            self._bury(client)

    def is_owed_beats(self) -> bool:
        """Whether any process has a page that must go on beating."""
        return bool(self._clients or self._shared)

    def settle_in(self, client: Client, tenant: int, owner: int, levels: tuple[int, ...], head: Head) -> None:
        """Make pages say what the next answer will: a new head is a new page. Raises OSError."""
        if client.head != head:
            control = self._control(head)
            client.control.close()
            client.head, client.control, client.rows = head, control, b""
        client.control.page.epoch = self.epoch  # never behind the answer
        client.ahead_ns, client.generation = procfs.clock_ahead_ns(client.pid), 0
        client.beat()
        if client.owner != owner:
            take_one(self._members, client.owner)
            self._members[owner] += 1
            client.owner = owner
        client.tenant = tenant
        client.levels = levels
        if head.flags:
            client.status = client.status or StatusMemory()
            client.show(self._rows(client.tenant, client.space))

    def _control(self, head: Head) -> ControlMemory:
        control = ControlMemory()
        page = control.page
        page.version, page.flags, page.boot[:] = pages.LAYOUT, head.flags, self._boot
        for place, (index, uuid) in enumerate(head.devices):
            page.devices[place].index, page.devices[place].uuid[:] = index, uuid
        page.device_count = len(head.devices)
        page.gates[:] = [1] * pages.DEVICES
        page.epoch = self.epoch
        return control

    def end(self, pid: int, at_ns: int) -> None:
        """A process of this pid ran for the last time then, says the kernel; a pidfd is silent until its driver has
        cleaned up. Of a client that came later it says nothing: that is another process."""
        client = self._clients.get(pid)
        if client and client.since_ns <= at_ns:
            client.has_ended = True
            self.parted(client)

    def _part_with_earlier_lives(self, processes: Mapping[int, Process]) -> None:
        """Who executes another program lets go of its pages, and may be shown waiting for ever.

        One that has only left its cgroups holds on to them: it finds its gates open, and says hello again.
        """
        for client in list(self._clients.values()):
            process = processes.get(client.pid)
            now = process.generation if process else 0
            if client.generation and now != client.generation and not client.has_ended:
                client.control.page.gates[:] = [pages.Gate.OPEN] * pages.DEVICES
                client.control.page.epoch ^= 1 << 63
                self._bury(client)
            client.generation = now

    def _bury(self, client: Client) -> None:
        if self._clients.pop(client.pid, None) is not client:
            return
        self._selector.unregister(client.pidfd)
        self.parted(client)
        client.close()
        take_one(self._members, client.owner)

    def show(self, processes: Mapping[int, Process]) -> None:
        """Bring the rows of every managed client up to what the ledger says, and part with those that it has ended."""
        self._part_with_earlier_lives(processes)
        self._held = by_tenant(processes)
        live = {(tgid, generation) for rows in self._held.values() for tgid, generation, _, _ in rows}
        self._names = {key: names for key, names in self._names.items() if key in live}
        self._tables.clear()
        for client in self._clients.values():
            if client.head.flags:
                client.show(self._rows(client.tenant, client.space))

    def _rows(self, tenant: int, space: int) -> bytes:
        if tenant not in self._held:
            return b""
        if (tenant, space) not in self._tables:
            self._tables[tenant, space] = self._make_rows(tenant, space)
        return self._tables[tenant, space]

    def _make_rows(self, tenant: int, space: int) -> bytes:
        rows = []
        for tgid, generation, device, held in self._held[tenant]:
            names = self._names.get((tgid, generation)) or procfs.pid_names(tgid)
            self._names[tgid, generation] = names
            if space in names:
                rows.append((names[space], device, held))
        return row_bytes(rows)

    def beat(self) -> None:
        """One heartbeat, and the epoch, on every page."""
        for client in self._clients.values():
            client.control.page.epoch = self.epoch
            client.beat()
        for ahead_ns, control in self._shared.items():
            self._beat_shared(control, ahead_ns)


def take_one(count: Counter[int], key: int) -> None:
    """One less, and no entry at zero."""
    count[key] -= 1
    if count[key] <= 0:
        del count[key]


def by_tenant(processes: Mapping[int, Process]) -> dict[int, list[Held]]:
    """What is held, by leaf tenant; where there is too much for a page, the largest."""
    held: dict[int, list[Held]] = {}
    for tgid, process in sorted(processes.items()):
        rows = [(tgid, process.generation, device, bytes_) for device, bytes_ in enumerate(process.bytes) if bytes_]
        if rows and process.levels:
            held.setdefault(process.levels[0], []).extend(rows)
    return {t: sorted(sorted(rows, key=lambda row: -row[3])[: pages.ROWS]) for t, rows in held.items()}
