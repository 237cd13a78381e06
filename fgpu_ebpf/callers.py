"""Connections of peers: who is at the other end, how far the hello has come, what each tenant has cost.

Owns: the connections and the accounts: at most 16 a tenant, and 40 ms of work in 250 ms; more waits, then goes. Never:
believes a peer, whom its pidfd and the kernel name, waits for one, or says what it is answered. When it fails: OSError,
but no peer can make it; whoever goes is counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic_ns, thread_time_ns

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.clients import take_one
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.pages import Hello

MOST_CONNECTIONS, MOST_PER_TENANT, MOST_HINTS = 1024, 16, 4096
PATIENCE_NS = 1_000_000_000
WAIT_NS, REFUSE_NS, FORGIVE_NS = 40_000_000, 50_000_000, 40_000_000  # of our time: the last at every heartbeat
SO_PEERPIDFD = 77
HELLO_BYTES = ctypes.sizeof(Hello)


@dataclass(frozen=True, slots=True)
class Standing:
    """What the ledger says of a process's cgroups; `managed` is None while nobody has decided."""

    managed: bool | None
    tenant: int
    levels: tuple[int, ...] = ()


def standing(ledger: Ledger | None, ids: Sequence[int]) -> Standing:
    """Managed if any level is, with all that are, leaf first; else unmanaged if any is known to be. Raises OSError."""
    said = {cgroup: ledger.resolved(cgroup) for cgroup in ids} if ledger else {}
    levels = tuple(cgroup for cgroup in ids if said.get(cgroup))
    if levels:
        return Standing(True, levels[0], levels[: pages.LEVELS])
    known = [cgroup for cgroup in ids if said.get(cgroup) is False]
    return Standing(False if known else None, (known or list(ids) or [0])[0])


@dataclass(slots=True, eq=False)
class Caller:
    """A connection: who is at its other end, and how far its hello has come."""

    sock: socket.socket
    pidfd: int
    pid: int
    tenant: int
    standing: Standing
    epoch: int
    since_ns: int
    heard: bool = False
    told: bool = False
    files: frozenset[tuple[int, int]] | None = None


class Callers:
    """All connections, oldest first.

    `stand` says what a pid's cgroups mean, and at which epoch; `look` is given who said hello, until it drops them.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        counts: dict[str, int],
        stand: Callable[[int], tuple[int, Standing]],
        look: Callable[[Caller], None],
    ) -> None:
        self._selector, self._counts, self._stand, self._look = selector, counts, stand, look
        self._callers: dict[Caller, None] = {}
        self._load: Counter[int] = Counter()  # connections of a tenant
        self._spent_ns: Counter[int] = Counter()  # our time that a tenant took and that is not forgiven yet
        self._hints: dict[int, int] = {}  # pid -> tenant: turns a flood away cheaply, lets nobody in

    def __len__(self) -> int:
        return len(self._callers)

    # -- in

    def accept(self, listener: socket.socket) -> None:
        """Take in who has come, some at a time."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):  # then the others' turn
                self._admit(listener.accept()[0])

    def _admit(self, sock: socket.socket) -> None:
        began_ns = thread_time_ns()
        hint = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        known = self._hints.get(hint, -1)
        if self._load[known] >= MOST_PER_TENANT or self._spent_ns[known] > REFUSE_NS:
            self._refuse(sock, "dropped_tenant")
            return
        caller = self._identify(sock)
        if caller is None:
            self._refuse(sock, "gone")
            return
        self._callers[caller] = None
        self._load[caller.tenant] += 1
        self._hints[hint] = caller.tenant
        self.charge(caller.tenant, thread_time_ns() - began_ns)
        self._hear(caller)
        self._make_room(caller)
        if caller in self._callers:
            self._selector.register(sock, selectors.EVENT_READ, partial(self._hear, caller))

    def _refuse(self, sock: socket.socket, count: str) -> None:
        sock.close()
        self._counts[count] += 1

    def _make_room(self, caller: Caller) -> None:
        """Where all places are taken, the longest silent goes: whoever speaks at once is never shut out."""
        if self._load[caller.tenant] > MOST_PER_TENANT:
            self.drop(caller, "dropped_tenant")
        elif len(self._callers) > MOST_CONNECTIONS:
            self.drop(next((c for c in self._callers if not c.heard), caller), "dropped_total")

    def _identify(self, sock: socket.socket) -> Caller | None:
        try:
            pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError:
            return None
        try:
            pid = procfs.pid_of(pidfd)
            epoch, stands = self._stand(pid)
        except (OSError, ValueError):
            os.close(pidfd)
            return None
        return Caller(sock, pidfd, pid, stands.tenant, stands, epoch, monotonic_ns())

    def _hear(self, caller: Caller) -> None:
        try:
            data = caller.sock.recv(HELLO_BYTES + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(caller, "gone")
        elif caller.heard or not well_formed(data):
            self.drop(caller, "malformed")
        else:
            caller.heard = True
            self._hear(caller)  # a second message
            self._look(caller)

    # -- while they wait, and out

    def has_time(self, caller: Caller) -> bool:
        """Is it still here, and has its tenant time left?"""
        return caller in self._callers and self._spent_ns[caller.tenant] <= WAIT_NS

    def charge(self, tenant: int, took_ns: int) -> None:
        """A tenant took so much of our time."""
        self._spent_ns[tenant] += took_ns

    def forgive(self) -> None:
        """Let every tenant off some of what it took: once a heartbeat."""
        self._spent_ns = Counter({t: ns - FORGIVE_NS for t, ns in self._spent_ns.items() if ns > FORGIVE_NS})
        self._hints = {pid: tenant for pid, tenant in self._hints.items() if tenant in self._spent_ns}
        if len(self._hints) > MOST_HINTS:
            self._hints.clear()

    def turn(self) -> None:
        """Look again at all who said hello; who has been here for too long goes."""
        for caller in list(self._callers):
            if monotonic_ns() - caller.since_ns > PATIENCE_NS:
                self.drop(caller, "hello_unanswered" if caller.heard else "silent")
            elif caller.heard:
                self._look(caller)

    def look_at(self, tenant: int) -> None:
        """Look again at those of one tenant who said hello."""
        for caller in [c for c in self._callers if c.heard and c.tenant == tenant]:
            self._look(caller)

    def drop(self, caller: Caller, count: str) -> None:
        """End a connection, and count it so."""
        if caller not in self._callers:
            return
        del self._callers[caller]
        with contextlib.suppress(KeyError):
            self._selector.unregister(caller.sock)
        caller.sock.close()
        if caller.pidfd >= 0:
            os.close(caller.pidfd)
        take_one(self._load, caller.tenant)
        self._counts[count] += 1


def well_formed(data: bytes) -> bool:
    """Is this a hello? All else in it is ignored."""
    if len(data) != HELLO_BYTES:
        return False
    hello = Hello.from_buffer_copy(data)
    return bool((hello.magic, hello.version, hello.size) == (pages.MAGIC, pages.LAYOUT, HELLO_BYTES))


def knows_peerpidfd() -> bool:
    """Can this kernel say who is at the other end (Linux 6.5)?"""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        try:
            os.close(one.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            return False
    return True
