"""Sessions of managed processes: their control and status pages, with rows and heartbeats on the control pages.

This module runs in the gatekeeper's main thread. A session lasts from a process's first registration until the
process's pidfd reports its exit, the process executes another program, or the process is no longer managed. Unmanaged
processes share a few control pages and have no session, so the maximum numbers of sessions do not apply to unmanaged
processes. The module `main` decides which pages a process gets, and `time_slicer` reads the status pages. If heartbeats
stop, shims open their gates. Errors are OSError.
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
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.gatekeeper.memfd_pages import ControlMemory, StatusMemory, row_bytes
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs

MOST_PROCESSES, PROCESSES_PER_OWNER = 8192, 1024
MOST_CLOCKS = 16  # maximum of clock offsets of unmanaged processes, besides 0; one page for each offset
FEW_PROCESSES = 64  # half of all places are reserved for owners with fewer processes
Held = tuple[int, int, int, int]  # tgid, generation, device, bytes


class PageHeader(NamedTuple):
    """The constant part of a control page. A process with a new header gets a new page."""

    flags: int = 0
    devices: tuple[tuple[int, bytes], ...] = ()


@dataclass(slots=True, eq=False)
class Session:
    """A managed process and its pages. `since_ns`: when the session began."""

    pid: int
    pidfd: int
    tenant: int
    owner: int  # the cgroup whose bounds apply, and for which this session counts
    space: int  # inode of its pid namespace
    header: PageHeader
    control: ControlMemory
    status: StatusMemory | None = None
    rows: bytes = b""
    levels: tuple[int, ...] = ()  # innermost first
    since_ns: int = field(default_factory=monotonic_ns)
    has_ended: bool = False  # the kernel has reported the exit; the pidfd reports the exit later
    ahead_ns: int = 0  # how far the process's clock, used for times on its pages, is ahead of the gatekeeper's
    generation: int = 0  # generation of the process's entry in the ledger; 0: no entry yet

    def show(self, rows: bytes) -> None:
        """Write these rows to the control page if the page has other rows."""
        if rows != self.rows:
            self.control.show(rows)
            self.rows = rows

    def beat(self) -> None:
        """Write a heartbeat to the control page."""
        self.control.page.heartbeat_ns = monotonic_ns() + self.ahead_ns

    def close(self) -> None:
        """Close the pidfd and the pages. The process can still use its own descriptors."""
        os.close(self.pidfd)
        self.control.close()
        if self.status:
            self.status.close()


class Sessions:
    """All sessions of the gatekeeper. `epoch`: the ledger's epoch, which is written to all pages."""

    def __init__(self, selector: selectors.BaseSelector, boot: bytes) -> None:
        self._selector, self._boot = selector, boot
        self._most = min(MOST_PROCESSES, max(16, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 3072) // 5))
        self._sessions: dict[int, Session] = {}  # by pid
        self._members: Counter[int] = Counter()  # by owner: number of sessions
        self._held: dict[int, list[Held]] = {}
        self._names: dict[tuple[int, int], dict[int, int]] = {}
        self._tables: dict[tuple[int, int], bytes] = {}  # rows by tenant and pid namespace
        self._shared: dict[int, ControlMemory] = {}  # by clock offset; the last requested is last
        self.epoch = 0
        self.on_end: Callable[[Session], None] = lambda _: None  # called once or twice for every session that ends

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, pid: int) -> Session | None:
        """Return the session of this pid; None: no session, or the process has exited."""
        session = self._sessions.get(pid)
        if session and not procfs.alive(session.pidfd):
            self._remove(session)
            return None
        return session

    def add(self, pid: int, pidfd: int, tenant: int, owner: int, header: PageHeader) -> Session | None:
        """Add a session, which then owns the pidfd, and return the session.

        Return None if there are too many sessions. Raise OSError on failure. In both cases the caller still owns the
        pidfd.
        """
        if not self._has_place(owner):
            return None
        session = Session(pid, pidfd, tenant, owner, procfs.pid_space(pidfd), header, self._control(header))
        try:
            self._selector.register(pidfd, selectors.EVENT_READ, partial(self._remove, session))
        except OSError:
            session.control.close()
            raise
        self._sessions[pid] = session
        self._members[owner] += 1
        return session

    def _has_place(self, owner: int) -> bool:
        own, taken = self._members[owner], len(self._sessions)
        if own >= PROCESSES_PER_OWNER or taken >= self._most:
            return False
        return own < FEW_PROCESSES or taken < self._most // 2

    def page_of_unmanaged(self, pid: int) -> ControlMemory:
        """Return the control page for unmanaged processes with the clock offset of this process.

        Raise OSError on failure.

        If there are too many different offsets, the page of the least recently requested offset is released and gets
        no more heartbeats. The shims of its processes then register again, as after an exit of the gatekeeper. The
        usual offset 0 always has its page.
        """
        ahead_ns = procfs.clock_ahead_ns(pid)
        odd = [other_ns for other_ns in self._shared if other_ns]
        if ahead_ns and ahead_ns not in self._shared and len(odd) >= MOST_CLOCKS:
            self._shared.pop(odd[0]).close()
        control = self._shared.pop(ahead_ns, None) or self._control(PageHeader())
        self._shared[ahead_ns] = control
        self._beat_shared(control, ahead_ns)  # so that the page is not older than the answer
        return control

    def _beat_shared(self, control: ControlMemory, ahead_ns: int) -> None:
        control.page.epoch = self.epoch
        control.page.heartbeat_ns = monotonic_ns() + ahead_ns

    def release(self, pid: int) -> None:
        """Open the gates of a process that is no longer managed, and end its session."""
        session = self._sessions.get(pid)
        if session:
            session.control.page.gates[:] = [abi.Gate.OPEN] * abi.DEVICES
            self._remove(session)

    def is_owed_beats(self) -> bool:
        """Return True if a process has a page that needs heartbeats."""
        return bool(self._sessions or self._shared)

    def update(self, session: Session, tenant: int, owner: int, levels: tuple[int, ...], header: PageHeader) -> None:
        """Update a session and its pages before the next answer. A new header needs a new page.

        Raise OSError on failure.
        """
        if session.header != header:
            control = self._control(header)
            session.control.leave()
            session.header, session.control, session.rows = header, control, b""
        session.control.page.epoch = self.epoch  # so that the page is not older than the answer
        session.ahead_ns, session.generation = procfs.clock_ahead_ns(session.pid), 0
        session.beat()
        if session.owner != owner:
            take_one(self._members, session.owner)
            self._members[owner] += 1
            session.owner = owner
        session.tenant = tenant
        session.levels = levels
        if header.flags:
            session.status = session.status or StatusMemory()
            session.show(self._rows(session.tenant, session.space))

    def _control(self, header: PageHeader) -> ControlMemory:
        control = ControlMemory()
        page = control.page
        page.version, page.flags, page.boot[:] = abi.LAYOUT, header.flags, self._boot
        for place, (index, uuid) in enumerate(header.devices):
            page.devices[place].index, page.devices[place].uuid[:] = index, uuid
        page.device_count = len(header.devices)
        page.gates[:] = [1] * abi.DEVICES
        page.epoch = self.epoch
        return control

    def end(self, pid: int, at_ns: int) -> None:
        """Record that the kernel has reported the exit of this pid at `at_ns`.

        The pidfd of the process becomes readable only after the driver has cleaned up. A session that began after
        `at_ns` belongs to another process with the same pid.
        """
        session = self._sessions.get(pid)
        if session and session.since_ns <= at_ns:
            session.has_ended = True
            self.on_end(session)

    def end_if_executed(self, session: Session, process: Process | None) -> bool:
        """End a session if its process has executed another program since. Return whether the session was ended.

        The pages of such a process are no longer mapped, so the status page could show a waiting thread forever.

        A process that has only left its cgroups still maps its pages. The gates of this process are opened and the
        epoch on its page is changed, so that the process registers again.

        Args:
            session: the session, which is kept if the exit of its process was reported.
            process: the current entry of the process in the ledger. Each executed program gets a new entry.
        """
        if session.has_ended or session.generation in (0, process.generation if process else 0):
            return False
        session.control.page.gates[:] = [abi.Gate.OPEN] * abi.DEVICES
        session.control.page.epoch ^= 1 << 63
        self._remove(session)
        return True

    def _remove(self, session: Session) -> None:
        if self._sessions.pop(session.pid, None) is not session:
            return
        self._selector.unregister(session.pidfd)
        self.on_end(session)
        session.close()
        take_one(self._members, session.owner)

    def show(self, processes: Mapping[int, Process]) -> None:
        """Close the sessions without an entry in the ledger, and update the rows of all other sessions."""
        for session in list(self._sessions.values()):
            process = processes.get(session.pid)
            self.end_if_executed(session, process)
            session.generation = process.generation if process else 0
        self._held = by_tenant(processes)
        live = {(tgid, generation) for rows in self._held.values() for tgid, generation, _, _ in rows}
        self._names = {key: names for key, names in self._names.items() if key in live}
        self._tables.clear()
        for session in self._sessions.values():
            if session.header.flags:
                session.show(self._rows(session.tenant, session.space))

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
        """Write a heartbeat and the epoch to every page."""
        for session in self._sessions.values():
            session.control.page.epoch = self.epoch
            session.beat()
        for ahead_ns, control in self._shared.items():
            self._beat_shared(control, ahead_ns)


def take_one(count: Counter[int], key: int) -> None:
    """Subtract one from a counter, and remove the counter's entry at zero."""
    count[key] -= 1
    if count[key] <= 0:
        del count[key]


def by_tenant(processes: Mapping[int, Process]) -> dict[int, list[Held]]:
    """Return at most abi.ROWS rows of each tenant, the rows with the most bytes, sorted.

    A process's tenant is its innermost level.
    """
    held: dict[int, list[Held]] = {}
    for tgid, process in sorted(processes.items()):
        all_ = (on_device + parked for on_device, parked in zip(process.bytes, process.parked, strict=True))
        rows = [(tgid, process.generation, device, bytes_) for device, bytes_ in enumerate(all_) if bytes_]
        if rows and process.levels:
            held.setdefault(process.levels[0], []).extend(rows)
    return {t: sorted(sorted(rows, key=lambda row: -row[3])[: abi.ROWS]) for t, rows in held.items()}
