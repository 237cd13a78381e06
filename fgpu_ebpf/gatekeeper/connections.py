"""Connections of shims until the answer to their hello: the identity of each peer process, and the order of service.

This module runs in the gatekeeper's main thread. The kernel identifies the peer by a pidfd. The data that the peer
sends is not used to identify the peer.

A workload (a bound owner with all cgroups inside the owner) may have MOST_PER_TENANT connections. At most MOST_SILENT
of these connections may be without a hello for longer than SILENCE_NS. Workloads are served in turn, one hello each.
Processor time that the gatekeeper uses for a workload is added up, and each heartbeat subtracts FORGIVE_NS. Hellos of
the workload wait if the sum exceeds WAIT_NS; hellos of new processes wait only if the sum exceeds STORM_NS. If the sum
exceeds REFUSE_NS, further connections of known processes are closed at once. As a result, many processes that start at
the same time are answered at once, and an endless series of connections is refused. No peer can cause an OSError. A
connection that the peer closes is counted.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic_ns, thread_time_ns

from fgpu_ebpf import abi
from fgpu_ebpf.abi import Hello
from fgpu_ebpf.gatekeeper import info_text
from fgpu_ebpf.gatekeeper.ledger_cache import ManagedState
from fgpu_ebpf.gatekeeper.peer_pidfd import PeerIdentifier
from fgpu_ebpf.gatekeeper.sessions import take_one
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.peer_credentials import pid_of
from fgpu_ebpf.linux.procmaps import File

MOST_CONNECTIONS, MOST_PER_TENANT, MOST_SILENT, MOST_HINTS, AT_ONCE = 1024, 512, 16, 4096, 64
PATIENCE_NS, SILENCE_NS, TURN_NS = 1_000_000_000, 200_000_000, 4_000_000
# Processor time of the gatekeeper. FORGIVE_NS is subtracted at each heartbeat.
WAIT_NS, REFUSE_NS, FORGIVE_NS = 40_000_000, 50_000_000, 40_000_000
STORM_NS = 1_000_000_000  # for new processes: a start costs the tenant as much processor time as the gatekeeper
HELLO_BYTES = ctypes.sizeof(Hello)


@dataclass(slots=True, eq=False)
class Connection:
    """A connection: its peer process, and the progress of its hello."""

    sock: socket.socket
    pidfd: int
    pid: int
    tenant: int  # the bound owner of the process, or the process's tenant if the owner is unknown
    managed_state: ManagedState
    epoch: int
    since_ns: int
    new: bool  # the process has not connected recently
    here: bool = True  # drop() was not called yet
    has_hello: bool = False
    is_info: bool = False  # the peer is fgpu-info, which gets a text instead of pages
    is_taken: bool = False  # the peer has both ends of the connection, see `gatekeeper.knocks`
    held: bool = False  # the answer waits for the agent, and this wait was counted
    told: bool = False  # a request about the process was sent to the agent
    watched: bool = False  # registered with the selector, for a hello or the end of the connection
    reading: bool = False  # the MappingScanner has queued the process
    # The libcuda and shim files that the process maps, with the offset at which the file's breakpoint was found, or 0.
    files: Mapping[File, int] | None = None


class Connections:
    """All connections, oldest first.

    Args:
        counts: counters of `gatekeeper.json`, which this object increments.
        managed_state_of: returns the epoch and the ledger's state of a process, given its pid and cgroup.
        look: called in turn for each connection that has sent its hello, and called again later if the connection was
            not dropped.
        ended_ns: see PeerIdentifier.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        counts: dict[str, int],
        managed_state_of: Callable[[int, int], tuple[int, ManagedState]],
        look: Callable[[Connection], None],
        ended_ns: Callable[[int], int | None],
    ) -> None:
        self._selector, self._counts, self._managed_state, self._look = selector, counts, managed_state_of, look
        self._peers = PeerIdentifier(ended_ns)
        self._connections: dict[Connection, None] = {}
        self._load: Counter[int] = Counter()  # by tenant: number of connections
        self._ready: dict[int, dict[Connection, None]] = {}  # by tenant, in the order of their turns
        self._spent_ns: Counter[int] = Counter()  # by tenant: processor time used and not yet forgiven
        self._hints: dict[int, int] = {}  # pid -> tenant: to refuse many connections cheaply, and detect new processes

    def __len__(self) -> int:
        return len(self._connections)

    # -- accepting

    def accept(self, listener: socket.socket) -> None:
        """Accept connections, at most AT_ONCE."""
        began_ns = thread_time_ns()
        for _ in range(AT_ONCE):  # afterwards the loop does its other work
            now_ns = monotonic_ns()
            try:
                sock = listener.accept()[0]
            except BlockingIOError:
                self._peers.none_waiting(now_ns)
                return
            began_ns = self._admit(sock, began_ns)

    def enter(self, found: socket.socket | str, took_ns: int) -> None:
        """Admit or refuse a connection that was taken from a process (`gatekeeper.knocks`), or count a failure.

        Args:
            found: the connection, or the name of the counter to increment.
            took_ns: the processor time that was used for the connection, in nanoseconds.
        """
        if isinstance(found, str):
            self._counts[found] += 1
        else:
            self._admit(found, thread_time_ns() - took_ns, is_taken=True)

    def _admit(self, sock: socket.socket, began_ns: int, is_taken: bool = False) -> int:
        """Admit or refuse a connection. Return the thread's processor time afterwards, in nanoseconds."""
        hint = pid_of(sock)
        known = self._hints.get(hint, -1)
        if self._load[known] >= MOST_PER_TENANT or self._spent_ns[known] > REFUSE_NS:
            return self._refuse(sock, "dropped_tenant")
        connection = self._identify(sock, hint not in self._hints)
        if connection is None:
            return self._refuse(sock, "gone")
        connection.is_taken = is_taken
        self._connections[connection] = None
        self._load[connection.tenant] += 1
        self._hints[hint] = connection.tenant
        self._receive(connection)
        self._make_room(connection)
        if connection.here and not connection.has_hello:
            self._watch(connection)
        return self._charge_since(connection.tenant, began_ns)

    def _refuse(self, sock: socket.socket, count: str) -> int:
        sock.close()
        self._counts[count] += 1
        return thread_time_ns()

    def _make_room(self, connection: Connection) -> None:
        """Drop a connection if there are too many connections.

        If the tenant of `connection` has too many connections, `connection` is dropped. If all tenants together have
        too many connections, the oldest connection without a hello is dropped. If every connection has a
        hello, the latest connection of the tenant with the most connections is dropped.
        """
        if self._load[connection.tenant] > MOST_PER_TENANT:
            self.drop(connection, "dropped_tenant")
        elif len(self._connections) > MOST_CONNECTIONS:
            self.drop(
                next((c for c in self._connections if not c.has_hello), None) or self._last_of_most(), "dropped_total"
            )

    def _last_of_most(self) -> Connection:
        most = max(self._load, key=self._load.__getitem__)
        return next(c for c in reversed(self._connections) if c.tenant == most)

    def _identify(self, sock: socket.socket, new: bool) -> Connection | None:
        try:
            pidfd = self._peers.pidfd(sock)
        except OSError:
            return None
        try:
            pid, cgroup = procfs.identity(pidfd)
            epoch, state = self._managed_state(pid, cgroup)
        except OSError:
            os.close(pidfd)
            return None
        return Connection(sock, pidfd, pid, state.owner or state.tenant, state, epoch, monotonic_ns(), new)

    def _watch(self, connection: Connection) -> None:
        self._selector.register(connection.sock, selectors.EVENT_READ, partial(self._receive, connection))
        connection.watched = True

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(HELLO_BYTES + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(connection, "gone")
        elif connection.has_hello or not well_formed(data):
            self.drop(connection, "malformed")
        else:
            connection.has_hello = True
            connection.is_info = data == info_text.QUESTION
            self.ready(connection)

    # -- turns of workloads

    def ready(self, connection: Connection) -> None:
        """Queue a connection until its tenant's turn. The connection has sent its hello."""
        self._ready.setdefault(connection.tenant, {})[connection] = None

    def pending(self) -> bool:
        """Return True if a connection waits for its turn."""
        return bool(self._ready)

    def serve(self) -> None:
        """Serve connections, one of each tenant in turn, for at most TURN_NS."""
        end_ns, began_ns = monotonic_ns() + TURN_NS, thread_time_ns()
        while self._ready and monotonic_ns() < end_ns:
            tenant = next(iter(self._ready))
            line = self._ready.pop(tenant)
            connection = next(iter(line))
            del line[connection]
            if line:
                self._ready[tenant] = line  # behind all other tenants
            if connection.here and self._has_time(connection):  # otherwise turn() queues the connection again
                self._look(connection)
                began_ns = self._charge_since(tenant, began_ns)

    def _has_time(self, connection: Connection) -> bool:
        return self._spent_ns[connection.tenant] <= (STORM_NS if connection.new else WAIT_NS)

    # -- waiting and leaving

    def charge(self, tenant: int, took_ns: int) -> None:
        """Charge processor time to a tenant."""
        self._spent_ns[tenant] += took_ns

    def _charge_since(self, tenant: int, began_ns: int) -> int:
        now_ns = thread_time_ns()
        self._spent_ns[tenant] += now_ns - began_ns
        return now_ns

    def owing(self) -> bool:
        """Return True if forgive() would reduce the processor time charged to a tenant, or remove a known pid."""
        return bool(self._spent_ns or self._hints)

    def forgive(self) -> None:
        """Subtract FORGIVE_NS from the processor time charged to each tenant.

        The caller calls this method at every heartbeat.
        """
        self._spent_ns = Counter({t: ns - FORGIVE_NS for t, ns in self._spent_ns.items() if ns > FORGIVE_NS})
        self._hints = {pid: tenant for pid, tenant in self._hints.items() if tenant in self._spent_ns}
        if len(self._hints) > MOST_HINTS:
            self._hints.clear()

    def turn(self) -> None:
        """Queue all connections with a hello again, and drop connections that are too old or too many.

        A connection is dropped after PATIENCE_NS. A connection without a hello is dropped after SILENCE_NS if its
        tenant has MOST_SILENT older connections without a hello.
        """
        now_ns = monotonic_ns()
        silent: Counter[int] = Counter()
        for connection in list(self._connections):
            silent[connection.tenant] += not connection.has_hello
            if now_ns - connection.since_ns > PATIENCE_NS:
                self.drop(connection, "hello_unanswered" if connection.has_hello else "silent")
            elif connection.has_hello:
                self._look_again(connection)
            elif silent[connection.tenant] > MOST_SILENT and now_ns - connection.since_ns > SILENCE_NS:
                self.drop(connection, "dropped_tenant")

    def _look_again(self, connection: Connection) -> None:
        if not connection.watched:  # the connection must wait: watch for its end, and for malformed data
            self._watch(connection)
        if not connection.reading:
            self.ready(connection)

    def drop(self, connection: Connection, count: str) -> None:
        """Close a connection, and increment the counter named `count`."""
        if not connection.here:
            return
        connection.here = False
        del self._connections[connection]
        if connection.watched:
            self._selector.unregister(connection.sock)
        if connection.is_taken:  # otherwise the peer, which has this end too, would not detect the end
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        connection.sock.close()
        if connection.pidfd >= 0:
            os.close(connection.pidfd)
        take_one(self._load, connection.tenant)
        self._counts[count] += 1


def well_formed(data: bytes) -> bool:
    """Return True if `data` is a request of fgpu-info, or has the size and the first three fields of a hello."""
    if len(data) != HELLO_BYTES:
        return data == info_text.QUESTION
    hello = Hello.from_buffer_copy(data)
    return bool((hello.magic, hello.version, hello.size) == (abi.MAGIC, abi.LAYOUT, HELLO_BYTES))
