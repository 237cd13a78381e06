"""Connections of peers: who is at the other end, how far the hello has come, whose turn it is.

Owns: the connections, at most 512 of a workload (the owner of its processes' bounds), and 16 that stay silent; the fair
order: workloads take turns, one hello each; the accounts: a workload may take 40 ms of our time in 250 ms, and for
processes that are new a second in advance, so that a storm is answered in one go and a flood waits, then goes. Never:
believes a peer, which its pidfd and the kernel name, waits for one, or says what the answer is. On failure: OSError,
but no peer can cause it; a peer that goes is counted.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import monotonic_ns, thread_time_ns

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.clients import take_one
from fgpu_ebpf.glance import Standing
from fgpu_ebpf.mappings import File
from fgpu_ebpf.pages import Hello
from fgpu_ebpf.visitors import Visitors, pid_of

MOST_CONNECTIONS, MOST_PER_TENANT, MOST_SILENT, MOST_HINTS, AT_ONCE = 1024, 512, 16, 4096, 64
PATIENCE_NS, SILENCE_NS, TURN_NS = 1_000_000_000, 200_000_000, 4_000_000
WAIT_NS, REFUSE_NS, FORGIVE_NS = 40_000_000, 50_000_000, 40_000_000  # of our time: the last at every heartbeat
STORM_NS = 1_000_000_000  # instead of WAIT_NS, for a process that is new: to make one costs its tenant what it costs us
HELLO_BYTES = ctypes.sizeof(Hello)


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
    new: bool  # a process that did not connect lately
    here: bool = True
    heard: bool = False
    held: bool = False
    told: bool = False  # the agent, of it
    watched: bool = False  # by the selector, for a hello or an end
    reading: bool = False
    files: Mapping[File, int] | None = (
        None  # that it maps, each with the offset at which its breakpoint was seen, else 0
    )


class Callers:
    """All connections, oldest first.

    `stand` says what a process's cgroup means, and at which epoch; `look` is given who said hello, until it drops them;
    `ended_ns` is for Visitors.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        counts: dict[str, int],
        stand: Callable[[int, int], tuple[int, Standing]],
        look: Callable[[Caller], None],
        ended_ns: Callable[[int], int | None],
    ) -> None:
        self._selector, self._counts, self._stand, self._look = selector, counts, stand, look
        self._visitors = Visitors(ended_ns)
        self._callers: dict[Caller, None] = {}
        self._load: Counter[int] = Counter()  # connections of a tenant
        self._ready: dict[int, dict[Caller, None]] = {}  # tenants whose turn comes, each with who is to be looked at
        self._spent_ns: Counter[int] = Counter()  # our time that a tenant took and that is not forgiven yet
        self._hints: dict[int, int] = {}  # pid -> tenant: turns a flood away cheaply, lets nobody in

    def __len__(self) -> int:
        return len(self._callers)

    # -- in

    def accept(self, listener: socket.socket) -> None:
        """Take in who has come, some at a time."""
        began_ns = thread_time_ns()
        for _ in range(AT_ONCE):  # then the others' turn
            now_ns = monotonic_ns()
            try:
                sock = listener.accept()[0]
            except BlockingIOError:
                self._visitors.alone(now_ns)
                return
            began_ns = self._admit(sock, began_ns)

    def _admit(self, sock: socket.socket, began_ns: int) -> int:
        """Answers when that was done, in our processor time."""
        hint = pid_of(sock)
        known = self._hints.get(hint, -1)
        if self._load[known] >= MOST_PER_TENANT or self._spent_ns[known] > REFUSE_NS:
            return self._refuse(sock, "dropped_tenant")
        caller = self._identify(sock, hint not in self._hints)
        if caller is None:
            return self._refuse(sock, "gone")
        self._callers[caller] = None
        self._load[caller.tenant] += 1
        self._hints[hint] = caller.tenant
        self._hear(caller)
        self._make_room(caller)
        if caller.here and not caller.heard:
            self._watch(caller)
        return self._charge_since(caller.tenant, began_ns)

    def _refuse(self, sock: socket.socket, count: str) -> int:
        sock.close()
        self._counts[count] += 1
        return thread_time_ns()

    def _make_room(self, caller: Caller) -> None:
        """Where all places are taken, the longest silent goes: whoever speaks at once is never shut out by them."""
        if self._load[caller.tenant] > MOST_PER_TENANT:
            self.drop(caller, "dropped_tenant")
        elif len(self._callers) > MOST_CONNECTIONS:
            self.drop(next((c for c in self._callers if not c.heard), None) or self._last_of_most(), "dropped_total")

    def _last_of_most(self) -> Caller:
        most = max(self._load, key=self._load.__getitem__)
        return next(c for c in reversed(self._callers) if c.tenant == most)

    def _identify(self, sock: socket.socket, new: bool) -> Caller | None:
        try:
            pidfd = self._visitors.pidfd(sock)
        except OSError:
            return None
        try:
            pid, cgroup = procfs.identity(pidfd)
            epoch, stands = self._stand(pid, cgroup)
        except OSError:
            os.close(pidfd)
            return None
        return Caller(sock, pidfd, pid, stands.owner or stands.tenant, stands, epoch, monotonic_ns(), new)

    def _watch(self, caller: Caller) -> None:
        self._selector.register(caller.sock, selectors.EVENT_READ, partial(self._hear, caller))
        caller.watched = True

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
            self.ready(caller)

    # -- their turns

    def ready(self, caller: Caller) -> None:
        """Look at who said hello when its tenant's turn comes."""
        self._ready.setdefault(caller.tenant, {})[caller] = None

    def pending(self) -> bool:
        """Is there anybody whose turn may come now?"""
        return bool(self._ready)

    def serve(self) -> None:
        """Look at one of each tenant after the other, for a while."""
        end_ns, began_ns = monotonic_ns() + TURN_NS, thread_time_ns()
        while self._ready and monotonic_ns() < end_ns:
            tenant = next(iter(self._ready))
            line = self._ready.pop(tenant)
            caller = next(iter(line))
            del line[caller]
            if line:
                self._ready[tenant] = line  # behind the others
            if caller.here and self._has_time(caller):  # else `turn` finds it again
                self._look(caller)
                began_ns = self._charge_since(tenant, began_ns)

    def _has_time(self, caller: Caller) -> bool:
        return self._spent_ns[caller.tenant] <= (STORM_NS if caller.new else WAIT_NS)

    # -- while they wait, and out

    def charge(self, tenant: int, took_ns: int) -> None:
        """A tenant took so much of our time."""
        self._spent_ns[tenant] += took_ns

    def _charge_since(self, tenant: int, began_ns: int) -> int:
        now_ns = thread_time_ns()
        self._spent_ns[tenant] += now_ns - began_ns
        return now_ns

    def owing(self) -> bool:
        """Has any tenant taken time that is not forgiven yet?"""
        return bool(self._spent_ns or self._hints)

    def forgive(self) -> None:
        """Let every tenant off some of what it took: once a heartbeat."""
        self._spent_ns = Counter({t: ns - FORGIVE_NS for t, ns in self._spent_ns.items() if ns > FORGIVE_NS})
        self._hints = {pid: tenant for pid, tenant in self._hints.items() if tenant in self._spent_ns}
        if len(self._hints) > MOST_HINTS:
            self._hints.clear()

    def turn(self) -> None:
        """Look again at all who said hello; who has been here for too long, or is one silent too many, goes."""
        now_ns = monotonic_ns()
        silent: Counter[int] = Counter()
        for caller in list(self._callers):
            silent[caller.tenant] += not caller.heard
            if now_ns - caller.since_ns > PATIENCE_NS:
                self.drop(caller, "hello_unanswered" if caller.heard else "silent")
            elif caller.heard:
                self._look_again(caller)
            elif silent[caller.tenant] > MOST_SILENT and now_ns - caller.since_ns > SILENCE_NS:
                self.drop(caller, "dropped_tenant")

    def _look_again(self, caller: Caller) -> None:
        if not caller.watched:  # it has to wait: is it gone, or not what it seemed?
            self._watch(caller)
        if not caller.reading:
            self.ready(caller)

    def drop(self, caller: Caller, count: str) -> None:
        """End a connection, and count it so."""
        if not caller.here:
            return
        caller.here = False
        del self._callers[caller]
        if caller.watched:
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
