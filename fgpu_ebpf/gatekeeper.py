"""Answers the hello of shims, keeps the control and status page of every process that said it, shows it its rows.

Owns: `<run>/shim/shim.sock`, `<run>/gatekeeper.lock`, `<run>/gatekeeper.json`, all control and status pages. Never:
believes what a tenant says (identity is the peer's pidfd and what the kernel says of it), writes a limit, waits for a
tenant. A tenant pays for its own hellos: at most 16 connections, and 40 ms of work in 250 ms; more waits, then goes.
When it fails: it ends, pages stop beating and shims open their gates after the lease; limits stand in the kernel. The
socket and its folder stay behind, so that a shim that finds nobody there refuses instead of running free.

Run as `python -m fgpu_ebpf.gatekeeper`; one a host, by flock. Needs Linux 6.5 (SO_PEERPIDFD).
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import resource
import select
import selectors
import signal
import socket
import struct
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic_ns, thread_time_ns

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.ledger import PINS, Ledger, LedgerMissing, Process
from fgpu_ebpf.pages import Answer, Code, ControlMemory, Hello, StatusMemory

MOST_CONNECTIONS, MOST_PER_TENANT = 1024, 16
MOST_PROCESSES, PROCESSES_PER_TENANT = 8192, 1024
BACKLOG = 64  # short: under a flood, whoever connects (and blocks) waits for this many, not for a thousand
MOST_MAPS_BYTES, MOST_READERS, MOST_HINTS, MOST_LINES = 1 << 23, 64, 4096, 10
DEEPEST = 32  # cgroups further in are taken for this one; the kernel side walks 16
PATIENCE_NS = 1_000_000_000
WAIT_NS, REFUSE_NS, FORGIVE_NS = 40_000_000, 50_000_000, 40_000_000  # of our time: the last at every heartbeat
AGAIN_NS, ROWS_NS, HEARTBEAT_NS, UPKEEP_NS = 10_000_000, 200_000_000, 250_000_000, 1_000_000_000
SO_PEERPIDFD, NS_GET_PARENT = 77, 0xB702
HELLO_BYTES, ANSWER_BYTES = ctypes.sizeof(Hello), ctypes.sizeof(Answer)
UNKNOWABLE = frozenset({(0, 0)})  # a file that nobody will ever have probed
CUDA_NAMES = (b"libcuda.so", b"libfgpu.so")
COUNTS = (
    *("hello_managed", "hello_unmanaged", "hello_held", "hello_unanswered", "malformed", "silent", "gone", "unread"),
    *("dropped_tenant", "dropped_total", "dropped_process", "discover_failed", "errors", "processes"),
)


_LIBC = ctypes.CDLL(None)
_LIBC.fopen.restype = ctypes.c_void_p
_LIBC.fread.restype = ctypes.c_size_t
_LIBC.fread.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
_LIBC.fclose.argtypes = (ctypes.c_void_p,)

# -- what the kernel says of a process ------------------------------------------------------------------------------


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _field(text: bytes, name: bytes) -> bytes:
    return next((line[len(name) :] for line in text.splitlines() if line.startswith(name)), b"")


def alive(pidfd: int) -> bool:
    """Has the process of this pidfd not ended yet?"""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def cgroups(pid: int, root: Path) -> list[int]:
    """Ids of the process's cgroup and those around it, leaf first; empty where unknown. Raises OSError: it is gone."""
    inside = os.fsdecode(_field(_read(f"/proc/{pid}/cgroup"), b"0::/")).split("/")[:DEEPEST]
    if ".." in inside:  # outside our cgroup namespace
        return []
    path, ids = str(root), [os.stat(root).st_ino]
    for part in filter(None, inside):
        path = f"{path}/{part}"
        ids.append(os.stat(path).st_ino)
    return ids[::-1]


def cuda_files(pid: int) -> frozenset[tuple[int, int]]:
    """(dev, ino) of every libcuda and shim mapped executable; UNKNOWABLE where it is gone or has absurdly many.

    Runs in a thread of its own. One foreign call reads all: each `read` of Python's would fight for the interpreter.
    """
    with mmap.mmap(-1, MOST_MAPS_BYTES) as room:
        file = _LIBC.fopen(f"/proc/{pid}/maps".encode(), b"re")
        if not file:
            return UNKNOWABLE
        start = ctypes.c_char.from_buffer(room)
        size = _LIBC.fread(ctypes.byref(start), 1, MOST_MAPS_BYTES, file)
        _LIBC.fclose(file)
        del start
        if not 0 < size < MOST_MAPS_BYTES:
            return UNKNOWABLE
        lines = (line for name in CUDA_NAMES for line in _lines_with(room, size, name))
        return frozenset(key for line in lines if (key := _file_key(line)))


def _lines_with(text: mmap.mmap, size: int, name: bytes) -> Iterator[bytes]:
    at = text.find(b"/" + name, 0, size)
    while at >= 0:
        end = text.find(b"\n", at, size)
        yield text[text.rfind(b"\n", 0, at) + 1 : end]
        at = text.find(b"/" + name, end, size)


def _file_key(line: bytes) -> tuple[int, int] | None:
    _, mode, _, dev, ino, path = line.split(maxsplit=5)
    if b"x" not in mode or not os.path.basename(path).startswith(CUDA_NAMES):
        return None
    major, minor = dev.split(b":")
    return os.makedev(int(major, 16), int(minor, 16)), int(ino)


def pid_names(tgid: int) -> dict[int, int]:
    """What each pid namespace calls a process, its own first: inode of the namespace -> pid. Empty: it is gone."""
    names: dict[int, int] = {}
    try:
        pids = _field(_read(f"/proc/{tgid}/status"), b"NSpid:").split()
        space = os.open(f"/proc/{tgid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for pid in reversed(pids):
                names[os.fstat(space).st_ino] = int(pid)
                if len(names) < len(pids):
                    space, inner = fcntl.ioctl(space, NS_GET_PARENT), space
                    os.close(inner)
        finally:
            os.close(space)
    except OSError:
        return {}
    return names


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


# -- the socket -----------------------------------------------------------------------------------------------------


class Door:
    """`<run>/shim/shim.sock`: bound aside in a folder held open, then renamed, so that there is always a listener."""

    def __init__(self, run: Path) -> None:
        self._shim = run / "shim"
        self._seen: tuple[int, ...] = ()
        self._folder = -1
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def open(self) -> None:
        """Make folder and socket, or make them again. Raises OSError."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._shim, 0o755)
        folder = os.open(self._shim, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            if os.fstat(folder).st_uid != os.geteuid():
                raise PermissionError(f"{self._shim} belongs to another user")
            os.fchmod(folder, 0o755)
            self._bind(listener, folder)
        except OSError:
            listener.close()
            os.close(folder)
            raise
        self.close()
        self._folder, self.listener = folder, listener
        self._seen = self._look()

    def _bind(self, listener: socket.socket, folder: int) -> None:
        aside = f"/proc/self/fd/{folder}/.shim.sock"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        listener.bind(aside)
        os.chmod(aside, 0o666)  # everybody may ask; who asks is what the kernel says
        listener.listen(BACKLOG)
        os.rename(".shim.sock", "shim.sock", src_dir_fd=folder, dst_dir_fd=folder)

    def _look(self) -> tuple[int, ...]:
        try:
            shim, sock = os.lstat(self._shim), os.stat("shim.sock", dir_fd=self._folder, follow_symlinks=False)
        except OSError:
            return ()
        return shim.st_dev, shim.st_ino, sock.st_dev, sock.st_ino

    def intact(self) -> bool:
        """Are folder and socket those we made?"""
        return bool(self._seen) and self._look() == self._seen

    def close(self) -> None:
        """Stop listening; folder and socket file stay."""
        self.listener.close()
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1


# -- the process ----------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Head:
    """What does not change on a control page: another head, another page."""

    flags: int = 0
    devices: tuple[tuple[int, bytes], ...] = ()


@dataclass(slots=True, eq=False)
class Client:
    """A process that has pages, for as long as its pidfd says that it lives."""

    pid: int
    pidfd: int
    tenant: int
    space: int  # inode of its pid namespace
    head: Head
    control: ControlMemory
    status: StatusMemory | None = None
    rows: bytes = b""


class Gatekeeper:
    """One selector, one thread (and short ones that read mappings); `run` returns after `end`. No peer can raise."""

    def __init__(self, run: Path, open_ledger: Callable[[], Ledger | None], root: Path) -> None:
        self._run, self._open_ledger, self._root = run, open_ledger, root
        self._ledger: Ledger | None = None
        self._door = Door(run)
        self._boot = os.urandom(16)
        self._epoch = 0
        self._ended = False
        self._most_processes = min(MOST_PROCESSES, max(16, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 3072) // 5))
        self._callers: dict[Caller, None] = {}  # oldest first
        self._clients: dict[int, Client] = {}  # by pid, which is theirs while we hold the pidfd
        self._load: Counter[int] = Counter()  # connections of a tenant
        self._members: Counter[int] = Counter()  # clients of a tenant
        self._spent_ns: Counter[int] = Counter()  # our time that a tenant took and that is not forgiven yet
        self._hints: dict[int, int] = {}  # pid -> tenant: turns a flood away cheaply, lets nobody in
        self._reading: set[int] = set()  # tenants whose mappings a thread reads: where it hangs, they alone wait
        self._read: deque[tuple[Caller, frozenset[tuple[int, int]], int]] = deque()
        self._held: dict[int, list[tuple[int, int, int, int]]] = {}
        self._names: dict[tuple[int, int], dict[int, int]] = {}
        self._counts = dict.fromkeys(COUNTS, 0)
        self._facts = {"started_ns": monotonic_ns(), "boot": self._boot.hex()}
        self._listed: tuple[int, list[tuple[int, bytes]]] = (-1, [])
        self._written: dict[str, int] = {}
        self._lines = 0
        self._agent = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._bell, self._ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, self._rung)
        self._open_door()

    def run(self) -> None:
        """Serve until `end`; folder and socket file stay."""
        jobs = {self._again: AGAIN_NS, self._show: ROWS_NS, self._beat: HEARTBEAT_NS, self._keep_up: UPKEEP_NS}
        due = dict.fromkeys(jobs, 0)
        while not self._ended:
            for job, period_ns in jobs.items():
                if due[job] <= monotonic_ns():
                    self._try(job)
                    due[job] = monotonic_ns() + period_ns
            waiting = self._callers or self._ledger is None
            wake_ns = min(at for job, at in due.items() if waiting or job != self._again)
            for key, _ in self._selector.select(max(0, wake_ns - monotonic_ns()) / 1e9):
                self._try(key.data)
        self._door.close()
        self._say("ends")

    def end(self, *_: object) -> None:
        """Leave `run` at its next turn: a signal handler."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._ring, b".")

    def _try(self, job: Callable[[], None]) -> None:
        try:
            job()
        except OSError as error:
            self._counts["errors"] += 1
            self._say(f"{getattr(job, '__name__', 'a peer')}: {error}")

    def _say(self, line: str) -> None:
        self._lines += 1
        with contextlib.suppress(OSError, ValueError):  # a log that nobody reads must not be waited for
            if self._lines <= MOST_LINES and select.select([], [2], [], 0)[1]:
                os.write(2, f"fgpu gatekeeper: {line}\n".encode())

    # -- a hello, step by step

    def _open_door(self) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._door.listener)
        self._door.open()
        self._selector.register(self._door.listener, selectors.EVENT_READ, self._accept)
        self._say(f"listens in {self._run}/shim")

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):  # then the others' turn
                self._admit(self._door.listener.accept()[0])

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
        self._spent_ns[caller.tenant] += thread_time_ns() - began_ns
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
            self._drop(caller, "dropped_tenant")
        elif len(self._callers) > MOST_CONNECTIONS:
            self._drop(next((c for c in self._callers if not c.heard), caller), "dropped_total")

    def _identify(self, sock: socket.socket) -> Caller | None:
        try:
            pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError:
            return None
        try:
            pid = int(_field(_read(f"/proc/self/fdinfo/{pidfd}"), b"Pid:"))
            epoch, stands = self._stand(pid)
        except (OSError, ValueError):
            os.close(pidfd)
            return None
        return Caller(sock, pidfd, pid, stands.tenant, stands, epoch, monotonic_ns())

    def _stand(self, pid: int) -> tuple[int, Standing]:
        epoch = self._ledger.epoch() if self._ledger else -1
        return epoch, standing(self._ledger, cgroups(pid, self._root))

    def _hear(self, caller: Caller) -> None:
        try:
            data = caller.sock.recv(HELLO_BYTES + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(caller, "gone")
        elif caller.heard or not well_formed(data):
            self._drop(caller, "malformed")
        else:
            caller.heard = True
            self._hear(caller)  # a second message
            self._look(caller)

    def _look(self, caller: Caller) -> None:
        """Answer, if all is known and the tenant has time left; else the caller waits."""
        if caller not in self._callers or self._ledger is None or self._spent_ns[caller.tenant] > WAIT_NS:
            return
        if not alive(caller.pidfd):
            self._drop(caller, "gone")
            return
        began_ns = thread_time_ns()
        try:
            self._decide(caller, self._ledger)
        except OSError:
            self._drop(caller, "errors")
        self._spent_ns[caller.tenant] += thread_time_ns() - began_ns

    def _decide(self, caller: Caller, ledger: Ledger) -> None:
        if caller.epoch != ledger.epoch():
            caller.epoch, caller.standing = self._stand(caller.pid)
        self._epoch = caller.epoch
        if caller.standing.managed is False:
            self._answer(caller, Code.UNMANAGED, Head(), [])
        elif caller.standing.managed is None:
            self._tell(caller)
        elif caller.files is None:
            self._start_reading(caller)
        elif all(ledger.file_known(dev, ino) for dev, ino in caller.files):
            self._hand_over(caller, ledger)
        else:
            self._tell(caller)

    def _tell(self, caller: Caller) -> None:
        """The agent does not know this process yet: say so, once."""
        if caller.told:
            return
        caller.told = True
        self._counts["hello_held"] += 1
        try:
            self._agent.sendto(json.dumps({"tgid": caller.pid}).encode(), str(self._run / "discover.sock"))
        except OSError:
            self._counts["discover_failed"] += 1

    def _start_reading(self, caller: Caller) -> None:
        if caller.tenant in self._reading or len(self._reading) >= MOST_READERS:
            return
        self._reading.add(caller.tenant)
        try:
            _thread.start_new_thread(self._read_files, (caller,))  # threading would wait until it runs
        except RuntimeError as error:  # no thread to be had
            self._reading.discard(caller.tenant)
            raise OSError(str(error)) from error

    def _read_files(self, caller: Caller) -> None:
        began_ns = thread_time_ns()
        files = cuda_files(caller.pid)
        self._read.append((caller, files, thread_time_ns() - began_ns))
        self._wake()

    def _rung(self) -> None:
        os.read(self._bell, 4096)
        while self._read:
            caller, files, took_ns = self._read.popleft()
            caller.files = files
            self._reading.discard(caller.tenant)
            self._spent_ns[caller.tenant] += took_ns
            for other in [c for c in self._callers if c.heard and c.tenant == caller.tenant]:
                self._look(other)

    def _hand_over(self, caller: Caller, ledger: Ledger) -> None:
        levels = caller.standing.levels
        head = Head(
            pages.ControlFlag.MANAGED | (pages.ControlFlag.SETTLE if ledger.settle() else 0),
            tuple(
                d
                for d in self._devices(caller.epoch, ledger)
                if any(ledger.limit(level, d[0]) is not None for level in levels)
            ),
        )
        with contextlib.ExitStack() as opened:
            usage = []
            for level in levels:
                fd = ledger.page_fd(level)
                if fd is None:  # decided, but not in force yet
                    return
                opened.callback(os.close, fd)
                usage.append(fd)
            self._answer(caller, Code.MANAGED, head, usage)

    def _devices(self, epoch: int, ledger: Ledger) -> list[tuple[int, bytes]]:
        """The host's devices: read anew when anything was decided, and at every heartbeat."""
        if self._listed[0] != epoch:
            self._listed = (epoch, ledger.devices())
        return self._listed[1]

    def _answer(self, caller: Caller, code: Code, head: Head, usage: list[int]) -> None:
        client = self._client(caller, head)
        if client is None:
            return
        form = (pages.MAGIC, pages.LAYOUT, ANSWER_BYTES, code, len(usage), len(head.devices), head.flags, caller.epoch)
        fds = [client.control.descriptor]
        if client.status and usage:
            fds += [client.status.descriptor, *usage]
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))
        try:
            caller.sock.sendmsg([bytes(Answer(*form))], [rights], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self._drop(caller, "unread")
            return
        self._drop(caller, "hello_managed" if usage else "hello_unmanaged")

    def _drop(self, caller: Caller, count: str) -> None:
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

    # -- clients and their pages

    def _client(self, caller: Caller, head: Head) -> Client | None:
        """The pages of this process, made or made anew where needed; None: it is gone or has no place, and dropped."""
        client = self._clients.get(caller.pid)
        if client and not alive(client.pidfd):
            self._bury(client)
            client = None
        if not alive(caller.pidfd):
            self._drop(caller, "gone")
            return None
        if client is None:
            client = self._enrol(caller, head)
        if client is not None:
            self._settle_in(client, caller.standing.tenant, head)
        return client

    def _enrol(self, caller: Caller, head: Head) -> Client | None:
        crowded = self._members[caller.standing.tenant] >= PROCESSES_PER_TENANT
        if crowded or len(self._clients) >= self._most_processes:
            self._drop(caller, "dropped_process")
            return None
        space = next(iter(pid_names(caller.pid)), 0)
        client = Client(caller.pid, caller.pidfd, caller.standing.tenant, space, head, self._control(head))
        caller.pidfd = -1
        self._clients[client.pid] = client
        self._members[client.tenant] += 1
        self._selector.register(client.pidfd, selectors.EVENT_READ, partial(self._bury, client))
        self._say(f"process {client.pid} of cgroup {client.tenant}: {'managed' if head.flags else 'unmanaged'}")
        return client

    def _settle_in(self, client: Client, tenant: int, head: Head) -> None:
        if client.head != head:
            control = self._control(head)
            client.control.close()
            client.head, client.control, client.rows = head, control, b""
        client.control.page.epoch = self._epoch  # never behind the answer
        if client.tenant != tenant:
            take_one(self._members, client.tenant)
            self._members[tenant] += 1
            client.tenant = tenant
        if head.flags:
            client.status = client.status or StatusMemory()
            self._refresh(client, self._rows(client.tenant, client.space))

    def _control(self, head: Head) -> ControlMemory:
        control = ControlMemory()
        page = control.page
        page.version, page.flags, page.boot[:] = pages.LAYOUT, head.flags, self._boot
        for place, (index, uuid) in enumerate(head.devices):
            page.devices[place].index, page.devices[place].uuid[:] = index, uuid
        page.device_count = len(head.devices)
        page.gates[:] = [1] * pages.DEVICES
        page.epoch, page.heartbeat_ns = self._epoch, monotonic_ns()
        return control

    def _bury(self, client: Client) -> None:
        if self._clients.pop(client.pid, None) is not client:
            return
        self._selector.unregister(client.pidfd)
        os.close(client.pidfd)
        client.control.close()
        if client.status:
            client.status.close()
        take_one(self._members, client.tenant)

    def _rows(self, tenant: int, space: int) -> bytes:
        rows = []
        for tgid, generation, device, held in self._held.get(tenant, ()):
            names = self._names.get((tgid, generation)) or pid_names(tgid)
            self._names[tgid, generation] = names
            if space in names:
                rows.append((names[space], device, held))
        return pages.row_bytes(rows)

    def _refresh(self, client: Client, rows: bytes) -> None:
        if rows != client.rows:
            client.control.show(rows)
            client.rows = rows

    # -- what is done again and again

    def _again(self) -> None:
        if self._ledger is None:
            self._ledger = self._open_ledger()
            if self._ledger:
                self._say("has the ledger")
                self._beat()
                self._show()
        for caller in list(self._callers):
            if monotonic_ns() - caller.since_ns > PATIENCE_NS:
                self._drop(caller, "hello_unanswered" if caller.heard else "silent")
            elif caller.heard:
                self._look(caller)

    def _show(self) -> None:
        if self._ledger is None:
            return
        self._held = by_tenant(self._ledger.processes())
        live = {(tgid, generation) for rows in self._held.values() for tgid, generation, _, _ in rows}
        self._names = {key: names for key, names in self._names.items() if key in live}
        tables: dict[tuple[int, int], bytes] = {}
        for client in self._clients.values():
            if client.head.flags:
                key = (client.tenant, client.space)
                if key not in tables:
                    tables[key] = self._rows(*key)
                self._refresh(client, tables[key])

    def _beat(self) -> None:
        self._spent_ns = Counter({t: ns - FORGIVE_NS for t, ns in self._spent_ns.items() if ns > FORGIVE_NS})
        self._hints = {pid: tenant for pid, tenant in self._hints.items() if tenant in self._spent_ns}
        if len(self._hints) > MOST_HINTS:
            self._hints.clear()
        self._listed = (-1, [])
        if self._ledger:
            self._epoch = self._ledger.epoch()
        for client in self._clients.values():
            client.control.page.epoch = self._epoch
            client.control.page.heartbeat_ns = monotonic_ns()

    def _keep_up(self) -> None:
        if self._lines > MOST_LINES:
            self._lines, more = 0, self._lines - MOST_LINES
            self._say(f"{more} more lines left out")
        self._lines = 0
        self._counts["processes"] = len(self._clients)
        if self._counts != self._written:
            aside = self._run / ".gatekeeper.json"
            aside.write_text(json.dumps(self._counts | self._facts))
            aside.rename(self._run / "gatekeeper.json")
            self._written = dict(self._counts)
        if not self._door.intact():
            self._open_door()


def take_one(count: Counter[int], key: int) -> None:
    """One less, and no entry at zero."""
    count[key] -= 1
    if count[key] <= 0:
        del count[key]


def by_tenant(processes: Mapping[int, Process]) -> dict[int, list[tuple[int, int, int, int]]]:
    """(tgid, generation, device, bytes) by leaf tenant; where there are too many for a page, the largest."""
    held: dict[int, list[tuple[int, int, int, int]]] = {}
    for tgid, process in sorted(processes.items()):
        rows = [(tgid, process.generation, device, bytes_) for device, bytes_ in enumerate(process.bytes) if bytes_]
        if rows and process.levels:
            held.setdefault(process.levels[0], []).extend(rows)
    return {t: sorted(sorted(rows, key=lambda row: -row[3])[: pages.ROWS]) for t, rows in held.items()}


def well_formed(data: bytes) -> bool:
    """Is this a hello? All else in it is ignored."""
    if len(data) != HELLO_BYTES:
        return False
    hello = Hello.from_buffer_copy(data)
    return bool((hello.magic, hello.version, hello.size) == (pages.MAGIC, pages.LAYOUT, HELLO_BYTES))


# -- start ----------------------------------------------------------------------------------------------------------


def open_ledger(pins: Path, factory: Callable[[Path], Ledger]) -> Ledger | None:
    """The ledger, or None while the loader has not pinned all of it."""
    try:
        return factory(pins)
    except LedgerMissing:
        return None


def knows_peerpidfd() -> bool:
    """Can this kernel say who is at the other end (Linux 6.5)?"""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        try:
            os.close(one.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            return False
    return True


def lock(run: Path) -> bool:
    """Be the only gatekeeper of this folder, until this process ends. Raises OSError."""
    run.mkdir(mode=0o755, parents=True, exist_ok=True)
    fd = os.open(run / "gatekeeper.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    return True


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fgpu-gatekeeper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pins", type=Path, default=PINS, help="where the ledger's maps are pinned")
    parser.add_argument("--run-dir", type=Path, default=Path("/run/fgpu"), help="where the socket's folder is made")
    parser.add_argument("--ready-fd", type=int, help="a descriptor to write 1 to, once listening")
    return parser.parse_args(argv)


def _prepare(run: Path) -> Path:
    """Everything that may be missing, before the first promise; answers the root of the cgroups. Raises OSError."""
    root = procfs.cgroup2_root()
    if root is None:
        raise OSError("no cgroup2 is mounted: boot with systemd.unified_cgroup_hierarchy=1")
    if not knows_peerpidfd():
        raise OSError("this kernel has no SO_PEERPIDFD: Linux >= 6.5 is needed for now")
    os.umask(0o022)
    if not lock(run):
        raise OSError(f"another gatekeeper holds {run}/gatekeeper.lock")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sys.setswitchinterval(0.0005)
    _thread.stack_size(256 * 1024)
    return root


def main(argv: Sequence[str] | None = None, ledger_factory: Callable[[Path], Ledger] = Ledger) -> int:
    """Serve until SIGTERM; 1 and one line where it cannot."""
    options = _options(argv)
    try:
        root = _prepare(options.run_dir)
        gatekeeper = Gatekeeper(options.run_dir, partial(open_ledger, options.pins, ledger_factory), root)
    except OSError as error:
        print(f"fgpu gatekeeper: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, gatekeeper.end)
    signal.signal(signal.SIGINT, gatekeeper.end)
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"1")
        os.close(options.ready_fd)
    gatekeeper.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
