"""The gatekeeper's main loop, which answers the hello of each shim and updates the pages of registered processes.

The command is `python -m fgpu_ebpf.gatekeeper`. The loop runs in the main thread. A file lock prevents a second
gatekeeper.

The kernel identifies a tenant's process by the pidfd of its connection. The data that the process sends is not used to
identify the process. The loop never waits for a tenant. Only the agent writes limits.

When the gatekeeper exits, the heartbeats on pages stop, and shims open their gates after the lease. Limits stay in
force in the kernel. The gatekeeper exits if the path of its lock no longer leads to the locked file, because shims
would not find the gatekeeper's socket in the new run folder.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic_ns

from fgpu_ebpf import abi
from fgpu_ebpf.abi import Answer, Code, ControlFlag, News
from fgpu_ebpf.gatekeeper import info_text
from fgpu_ebpf.gatekeeper.connections import Connection, Connections
from fgpu_ebpf.gatekeeper.discovery_requests import DiscoveryRequests
from fgpu_ebpf.gatekeeper.guardian import Guardian
from fgpu_ebpf.gatekeeper.knocks import Knocks
from fgpu_ebpf.gatekeeper.ledger_cache import Grant, LedgerCache, Lineages, ManagedState, managed_state
from fgpu_ebpf.gatekeeper.listener import Listener
from fgpu_ebpf.gatekeeper.mapping_scanner import MappingScanner
from fgpu_ebpf.gatekeeper.rate_limited_log import LogLines
from fgpu_ebpf.gatekeeper.sessions import PageHeader, Session, Sessions
from fgpu_ebpf.gatekeeper.startup import open_ledger, prepare
from fgpu_ebpf.gatekeeper.time_slicer import TimeSlicer
from fgpu_ebpf.ledger.ledger import PINS, Ledger
from fgpu_ebpf.linux import atomic_file, file_locks, malloc, procfs, sd_notify
from fgpu_ebpf.linux.file_locks import FileLock
from fgpu_ebpf.linux.wakeup import Wakeup

AGAIN_NS, ROWS_NS, HEARTBEAT_NS, UPKEEP_NS = 10_000_000, 500_000_000, 250_000_000, 1_000_000_000
GIVE_BACK_NS = 30_000_000_000
AHEAD_BYTES = 256 << 10  # allocated in advance for small objects: enough for many simultaneous hellos
ANSWER_BYTES = ctypes.sizeof(Answer)
COUNTS = (
    *("hello_managed", "hello_unmanaged", "hello_refused", "hello_held", "hello_unanswered", "malformed", "silent"),
    *("gone", "unread", "dropped_tenant", "dropped_total", "dropped_process", "discover_failed", "errors", "processes"),
    "info",
)


class Gatekeeper:
    """The state of the gatekeeper, and its loop. MappingScanner, Knocks and TimeSlicer have threads of their own."""

    def __init__(
        self, lock: FileLock, open_ledger: Callable[[], Ledger | None], root: Path, is_stand_in: bool = False
    ) -> None:
        self._lock, self._open_ledger, self._is_stand_in = lock, open_ledger, is_stand_in
        self._run = lock.path.parent
        self._ledger: Ledger | None = None
        self._requests, self._lineages = DiscoveryRequests(self._run), Lineages(root)
        self._cache: LedgerCache | None = None
        self._ended, self._lost, self._last_word = False, False, "exiting"
        self._listed: tuple[int, list[tuple[int, bytes]]] = (-1, [])
        boot, self._counts = os.urandom(16), dict.fromkeys(COUNTS, 0)
        self._facts = {"started_ns": monotonic_ns(), "boot": boot.hex()}
        self._written: dict[str, object] = {}
        self._log = LogLines("fgpu gatekeeper")
        self._wakeup = Wakeup()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._take_finished)
        self._connections = Connections(self._selector, self._counts, self._managed_state, self._look, self._ended_ns)
        self._sessions = Sessions(self._selector, boot)
        self._scanner, self._knocks = MappingScanner(self._wakeup.wake), Knocks(self._wakeup.wake)
        self._watchdog, self._slicer, self._guardian = sd_notify.Watchdog(), TimeSlicer(), Guardian()
        self._sessions.on_end = lambda session: self._guardian.end(id(session), self._slicer.remove(session))
        self._listener = Listener(self._run)
        self._open_listener()

    def run(self) -> bool:
        """Serve until end() is called or the lock is lost.

        With --stand-in, also end if another gatekeeper waits for the lock. The run folder and the socket file stay.
        Return False if the lock was lost.
        """
        jobs = {
            self._again: AGAIN_NS, self._show: ROWS_NS, self._beat: HEARTBEAT_NS, self._keep_up: UPKEEP_NS,
            malloc.give_back: GIVE_BACK_NS,
        }  # fmt: skip
        due = dict.fromkeys(jobs, 0)
        malloc.settle(AHEAD_BYTES)
        while not self._ended:
            now_ns = monotonic_ns()
            for job in [job for job, at_ns in due.items() if at_ns <= now_ns]:
                self._try(job)
                due[job] = monotonic_ns() // jobs[job] * jobs[job] + jobs[job]  # aligned, so that jobs share wake-ups
            for key, _ in self._selector.select(self._leisure_ns(due) / 1e9):
                self._try(key.data)
            for step in (self._connections.serve, self._ask_agent, self._scanner.go, self._knocks.go):
                self._try(step)
            self._close_cache()
        self._slicer.end()
        self._listener.close()
        self._log.say(self._last_word)
        return not self._lost

    def _leisure_ns(self, due: dict[Callable[[], None], int]) -> int:
        """Return how many nanoseconds the selector may wait until the next job is due."""
        if self._connections.pending():
            return 0
        waiting = self._connections or self._ledger is None
        idle = {self._again: not waiting, self._show: not self._sessions, self._beat: self._forgotten()}
        wakes_ns = [at for job, at in due.items() if not idle.get(job)]
        workers_ns = [at_ns for at_ns in (self._scanner.due_ns(), self._knocks.due_ns()) if at_ns is not None]
        return max(0, min([*wakes_ns, *workers_ns]) - monotonic_ns())

    def _forgotten(self) -> bool:
        """Return True if no heartbeat is needed: no process has a page, and no record is left to expire."""
        return not self._sessions.is_owed_beats() and not self._connections.owing() and not self._requests

    def end(self, *_: object) -> None:
        """Make run() return after its current iteration. This method is also the handler of SIGTERM and SIGINT."""
        self._ended = True
        self._wakeup.wake()

    def _try(self, job: Callable[[], None]) -> None:
        try:
            job()
        except OSError as error:
            self._counts["errors"] += 1
            self._log.say(f"error in {getattr(job, '__name__', 'a connection')}: {error}")

    # -- a hello, step by step

    def _open_listener(self) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._listener.socket)
        self._listener.open()
        self._selector.register(self._listener.socket, selectors.EVENT_READ, self._accept)
        self._log.say(f"listening in {self._run}/shim")

    def _accept(self) -> None:
        self._connections.accept(self._listener.socket)

    def _ended_ns(self, pid: int) -> int | None:
        return self._ledger.times.ended_ns(pid) if self._ledger else None

    def _now(self, ledger: Ledger) -> LedgerCache:
        """Return the cache of ledger lookups for this iteration."""
        if self._cache is None or self._cache.full():
            self._close_cache()
            epoch = ledger.epoch()
            self._sessions.epoch = epoch
            self._cache = LedgerCache(ledger, epoch, self._devices(epoch, ledger), self._lineages)
        return self._cache

    def _close_cache(self) -> None:
        if self._cache:
            self._cache.close()
            self._cache = None

    def _managed_state(self, pid: int, cgroup: int) -> tuple[int, ManagedState]:
        if self._ledger is None:
            return -1, managed_state(None, self._lineages.of(pid, cgroup))
        cache = self._now(self._ledger)
        return cache.epoch, cache.managed_state(pid, cgroup)

    def _look(self, connection: Connection) -> None:
        """Answer a connection if the answer is known. Otherwise keep the connection waiting."""
        if self._ledger is None:
            return
        try:
            self._decide(connection, self._now(self._ledger))
        except ProcessLookupError:
            self._connections.drop(connection, "gone")
        except OSError:
            self._connections.drop(connection, "errors")

    def _decide(self, connection: Connection, cache: LedgerCache) -> None:
        if connection.is_info:
            self._answer_info(connection, cache.epoch)
            return
        if connection.epoch != cache.epoch or connection.managed_state.managed is None:
            connection.epoch, connection.managed_state = (
                cache.epoch,
                cache.managed_state(*procfs.identity(connection.pidfd)),
            )
        if connection.managed_state.refused:
            self._answer_refused(connection)
        elif connection.managed_state.managed is False:
            self._answer_unmanaged(connection)
        elif connection.managed_state.managed is None:
            self._tell(connection)
        elif connection.files is None:
            self._scanner.want(connection)
        elif not cache.probed(connection.files):
            connection.files = None  # the process is scanned again later, when its files may be probed
            self._tell(connection)
        elif grant := cache.grant(connection.managed_state.levels):  # None: a limit is decided, but not in force yet
            self._answer_managed(connection, grant)

    def _tell(self, connection: Connection) -> None:
        """Queue a request to the agent to examine the process of a connection. The connection waits for the result."""
        self._counts["hello_held"] += not connection.held
        connection.held = True
        self._requests.add(connection)

    def _ask_agent(self) -> None:
        self._counts["discover_failed"] += not self._requests.send()

    def _take_finished(self) -> None:
        self._wakeup.clear()
        for connection, took_ns in self._scanner.take():
            self._connections.charge(connection.tenant, took_ns)
            self._connections.ready(connection)
        for found in self._knocks.take():
            self._connections.enter(*found)

    def _devices(self, epoch: int, ledger: Ledger) -> list[tuple[int, bytes]]:
        """Return the host's devices, from a cache that is renewed with every epoch and at every heartbeat."""
        if self._listed[0] != epoch:
            self._listed = (epoch, ledger.devices())
        return self._listed[1]

    def _answer_unmanaged(self, connection: Connection) -> None:
        """Answer with a page that unmanaged processes share. Unmanaged processes have no session."""
        self._sessions.release(connection.pid)
        control = self._sessions.page_of_unmanaged(connection.pid)
        self._answer(connection, Code.UNMANAGED, Grant(PageHeader(), ()), [control.descriptor])

    def _answer_refused(self, connection: Connection) -> None:
        """Answer that the process gets no memory, because a limit of its cgroup could not be put in force."""
        self._answer(connection, Code.REFUSED, Grant(PageHeader(), ()), [])

    def _answer_managed(self, connection: Connection, grant: Grant) -> None:
        session = self._session(connection, grant.header)
        if session and session.status:
            descriptors = [session.control.descriptor, session.status.descriptor, *grant.usage]
            self._answer(connection, Code.MANAGED, grant, descriptors)

    def _answer_info(self, connection: Connection, epoch: int) -> None:
        """Answer a request of fgpu-info with a text about the peer's cgroup. The peer gets no pages and no session."""
        assert self._ledger
        levels = self._lineages.of(*procfs.identity(connection.pidfd))
        said = info_text.REFUSED
        if not connection.managed_state.refused:
            said = info_text.text(self._ledger, levels, self._devices(epoch, self._ledger), monotonic_ns())
        self._send(connection, said.encode(), [], "info")

    def _answer(self, connection: Connection, code: Code, grant: Grant, fds: Sequence[int]) -> None:
        header, usage = grant.header, grant.usage
        form = (abi.MAGIC, abi.LAYOUT, ANSWER_BYTES, code, len(usage), len(header.devices), header.flags)
        self._send(connection, bytes(Answer(*form, connection.epoch)), fds, f"hello_{code.name.lower()}")

    def _send(self, connection: Connection, answer: bytes, fds: Sequence[int], count: str) -> None:
        """Send an answer, close the connection, and increment the counter named `count`."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        try:
            connection.sock.sendmsg([answer], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self._connections.drop(connection, "unread")
            return
        self._connections.drop(connection, count)

    def _session(self, connection: Connection, header: PageHeader) -> Session | None:
        """Create or update the session of a connection's process, and return the session.

        Return None after dropping the connection: the process has exited, or there are too many sessions.
        """
        session = self._sessions.get(connection.pid)
        if not procfs.alive(connection.pidfd) or (session and session.has_ended):
            self._connections.drop(connection, "gone")
            return None
        state = connection.managed_state
        process = self._ledger.enter(connection.pid, state.levels) if self._ledger and state.levels else None
        if session is None or self._sessions.end_if_executed(session, process):
            session = self._sessions.add(connection.pid, connection.pidfd, state.tenant, state.owner, header)
            if session is None:
                self._connections.drop(connection, "dropped_process")
                return None
            connection.pidfd = -1
            self._log.say(f"process {session.pid} of cgroup {state.tenant} has registered")
        self._sessions.update(session, state.tenant, state.owner, state.levels, header)
        session.control.page.tag, session.generation = (process.tag, process.generation) if process else (0, 0)
        self._slicer.register(session)
        if header.flags & ControlFlag.MPS:
            self._guardian.watch(id(session), session.pid, session.pidfd, connection.tenant)
        return session

    # -- periodic work

    def _again(self) -> None:
        if self._ledger is None and (ledger := self._open_ledger()):
            with contextlib.ExitStack() as undo:
                undo.callback(ledger.close)
                self._slicer.use(ledger)
                self._listen(ledger, undo)
                undo.pop_all()
            self._ledger, self._scanner.check = ledger, ledger.file_check
            self._log.say("opened the ledger, the kernel's record of charged memory")
            self._beat()
            self._show()
        self._connections.turn()

    def _listen(self, ledger: Ledger, undo: contextlib.ExitStack) -> None:
        bell = ledger.times.bell()
        if not bell:
            return

        def receive() -> None:
            for event in bell.read():
                if event.kind == News.ENDED:
                    self._sessions.end(event.tgid, event.at_ns)
                elif event.kind == News.KNOCK:
                    self._knocks.want(event)
            self._slicer.shares_changed()

        undo.callback(bell.close)
        self._selector.register(bell, selectors.EVENT_READ, receive)
        self._slicer.is_told = True

    def _show(self) -> None:
        if self._ledger and self._sessions:
            self._sessions.show(self._ledger.processes())

    def _beat(self) -> None:
        self._watchdog.ping()
        self._connections.forgive()
        self._requests.forget()
        self._listed = (-1, [])
        if self._ledger:
            self._sessions.epoch = self._ledger.epoch()
        self._sessions.beat()

    def _keep_up(self) -> None:
        self._log.renew()
        self._lineages.forget()
        if not self._lock.is_held():
            self._ended = self._lost = True
            self._last_word = f"{self._lock.path} is no longer the file that this gatekeeper has locked: exiting"
            return
        if self._is_stand_in and file_locks.is_locked(self._run / file_locks.NEXT):
            self._ended, self._last_word = True, "a service's gatekeeper waits for the lock: exiting"
            return
        if not self._listener.intact():
            self._open_listener()
        self._accept()  # if no connection waits, the peer identifier records the time
        self._slicer.shares_changed()  # in case the event of a change was lost
        self._counts["processes"] = len(self._sessions)
        said = {**self._counts, **self._facts, "slices": self._slicer.counts()}
        if said != self._written:
            atomic_file.write(self._run / "gatekeeper.json", json.dumps(said))
            self._written = said


# -- start ----------------------------------------------------------------------------------------------------------


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fgpu-gatekeeper", description="Registers GPU programs of tenants and schedules their turns."
    )
    parser.add_argument("--pins", type=Path, default=PINS, help="the folder in which the agent pins its BPF maps")
    parser.add_argument("--run-dir", type=Path, default=Path("/run/fgpu"), help="the folder of shim/shim.sock")
    parser.add_argument("--wait", action="store_true", help="wait while another gatekeeper holds the lock")
    parser.add_argument("--stand-in", action="store_true", help="exit as soon as another gatekeeper waits for the lock")
    parser.add_argument("--ready-fd", type=int, help="write 1 to this descriptor as soon as the socket listens")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, ledger_factory: Callable[[Path], Ledger] = Ledger) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status.

    The status is 1 if the start fails, after one line on standard error, or if the lock is lost.
    """
    options = _options(argv)
    lock = FileLock(options.run_dir / file_locks.GATEKEEPER)
    try:
        root = prepare(lock, options.wait)
        gatekeeper = Gatekeeper(lock, partial(open_ledger, options.pins, ledger_factory), root, options.stand_in)
    except OSError as error:
        print(f"fgpu gatekeeper: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, gatekeeper.end)
    signal.signal(signal.SIGINT, gatekeeper.end)
    sd_notify.ready()
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"1")
        os.close(options.ready_fd)
    return 0 if gatekeeper.run() else 1
