"""Answers the hello of shims, and keeps what it told every process that said it up to date.

Owns: the decision about each hello, the loop that all else runs in, `<run>/gatekeeper.json`. Never: believes what a
tenant says (identity is the peer's pidfd and what the kernel says of it), writes a limit, waits for a tenant.
When it fails: it ends, pages stop beating and shims open their gates after the lease; limits stand in the kernel. It
ends by itself where its run folder is no longer the one that it locked, since nobody would find it there.

Run as `python -m fgpu_ebpf.gatekeeper`; one a host, by flock. Needs Linux 6.5 (SO_PEERPIDFD).
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import ctypes
import json
import os
import resource
import select
import selectors
import signal
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic_ns, thread_time_ns

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.callers import Caller, Callers, Standing, knows_peerpidfd, standing
from fgpu_ebpf.clients import Client, Clients, Head
from fgpu_ebpf.door import Door, Lock
from fgpu_ebpf.ledger import PINS, Ledger, LedgerMissing
from fgpu_ebpf.pages import Answer, Code

MOST_READERS, MOST_LINES = 64, 10
AGAIN_NS, ROWS_NS, HEARTBEAT_NS, UPKEEP_NS = 10_000_000, 200_000_000, 250_000_000, 1_000_000_000
ANSWER_BYTES = ctypes.sizeof(Answer)
COUNTS = (
    *("hello_managed", "hello_unmanaged", "hello_held", "hello_unanswered", "malformed", "silent", "gone", "unread"),
    *("dropped_tenant", "dropped_total", "dropped_process", "discover_failed", "errors", "processes"),
)


class Gatekeeper:
    """One selector, one thread (and short ones that read mappings); `run` returns after `end`. No peer can raise."""

    def __init__(self, lock: Lock, open_ledger: Callable[[], Ledger | None], root: Path) -> None:
        self._lock, self._open_ledger, self._root = lock, open_ledger, root
        self._run = lock.path.parent
        self._ledger: Ledger | None = None
        self._ended = self._lost = False
        self._reading: set[int] = set()  # tenants whose mappings a thread reads: where it hangs, they alone wait
        self._read: deque[tuple[Caller, frozenset[tuple[int, int]], int]] = deque()
        self._listed: tuple[int, list[tuple[int, bytes]]] = (-1, [])
        boot = os.urandom(16)
        self._counts = dict.fromkeys(COUNTS, 0)
        self._facts = {"started_ns": monotonic_ns(), "boot": boot.hex()}
        self._written: dict[str, int] = {}
        self._lines = 0
        self._agent = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._bell, self._ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, self._rung)
        self._callers = Callers(self._selector, self._counts, self._stand, self._look)
        self._clients = Clients(self._selector, boot)
        self._door = Door(self._run)
        self._open_door()

    def run(self) -> bool:
        """Serve until `end`; folder and socket file stay. False: it ended because its lock was lost."""
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
        self._say(f"{self._lock.path} is no longer the one that was locked: ends" if self._lost else "ends")
        return not self._lost

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
        self._callers.accept(self._door.listener)

    def _stand(self, pid: int) -> tuple[int, Standing]:
        epoch = self._ledger.epoch() if self._ledger else -1
        return epoch, standing(self._ledger, procfs.cgroups(pid, self._root))

    def _look(self, caller: Caller) -> None:
        """Answer, if all is known and the tenant has time left; else the caller waits."""
        if self._ledger is None or not self._callers.has_time(caller):
            return
        if not procfs.alive(caller.pidfd):
            self._callers.drop(caller, "gone")
            return
        began_ns = thread_time_ns()
        try:
            self._decide(caller, self._ledger)
        except OSError:
            self._callers.drop(caller, "errors")
        self._callers.charge(caller.tenant, thread_time_ns() - began_ns)

    def _decide(self, caller: Caller, ledger: Ledger) -> None:
        if caller.epoch != ledger.epoch() or caller.standing.managed is None:
            caller.epoch, caller.standing = self._stand(caller.pid)
        self._clients.epoch = caller.epoch
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
        files = procfs.cuda_files(caller.pid)
        self._read.append((caller, files, thread_time_ns() - began_ns))
        self._wake()

    def _rung(self) -> None:
        os.read(self._bell, 4096)
        while self._read:
            caller, files, took_ns = self._read.popleft()
            caller.files = files
            self._reading.discard(caller.tenant)
            self._callers.charge(caller.tenant, took_ns)
            self._callers.look_at(caller.tenant)

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
            self._callers.drop(caller, "unread")
            return
        self._callers.drop(caller, "hello_managed" if usage else "hello_unmanaged")

    def _client(self, caller: Caller, head: Head) -> Client | None:
        """The pages of this process, made or made anew where needed; None: it is gone or has no place, and dropped."""
        client = self._clients.get(caller.pid)
        if not procfs.alive(caller.pidfd):
            self._callers.drop(caller, "gone")
            return None
        tenant = caller.standing.tenant
        if client is None:
            client = self._clients.enrol(caller.pid, caller.pidfd, tenant, head)
            if client is None:
                self._callers.drop(caller, "dropped_process")
                return None
            caller.pidfd = -1
            self._say(f"process {client.pid} of cgroup {tenant}: {'managed' if head.flags else 'unmanaged'}")
        self._clients.settle_in(client, tenant, head)
        return client

    # -- what is done again and again

    def _again(self) -> None:
        if self._ledger is None:
            self._ledger = self._open_ledger()
            if self._ledger:
                self._say("has the ledger")
                self._beat()
                self._show()
        self._callers.turn()

    def _show(self) -> None:
        if self._ledger:
            self._clients.show(self._ledger.processes())

    def _beat(self) -> None:
        self._callers.forgive()
        self._listed = (-1, [])
        if self._ledger:
            self._clients.epoch = self._ledger.epoch()
        self._clients.beat()

    def _keep_up(self) -> None:
        if self._lines > MOST_LINES:
            self._lines, more = 0, self._lines - MOST_LINES
            self._say(f"{more} more lines left out")
        self._lines = 0
        if not self._lock.held():
            self._ended = self._lost = True
            return
        self._counts["processes"] = len(self._clients)
        if self._counts != self._written:
            aside = self._run / ".gatekeeper.json"
            aside.write_text(json.dumps(self._counts | self._facts))
            aside.rename(self._run / "gatekeeper.json")
            self._written = dict(self._counts)
        if not self._door.intact():
            self._open_door()


# -- start ----------------------------------------------------------------------------------------------------------


def open_ledger(pins: Path, factory: Callable[[Path], Ledger]) -> Ledger | None:
    """The ledger, or None while the loader has not pinned all of it."""
    try:
        return factory(pins)
    except LedgerMissing:
        return None


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fgpu-gatekeeper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pins", type=Path, default=PINS, help="where the ledger's maps are pinned")
    parser.add_argument("--run-dir", type=Path, default=Path("/run/fgpu"), help="where the socket's folder is made")
    parser.add_argument("--ready-fd", type=int, help="a descriptor to write 1 to, once listening")
    return parser.parse_args(argv)


def _prepare(lock: Lock) -> Path:
    """Everything that may be missing, before the first promise; answers the root of the cgroups. Raises OSError."""
    root = procfs.cgroup2_root()
    if root is None:
        raise OSError("no cgroup2 is mounted: boot with systemd.unified_cgroup_hierarchy=1")
    if not knows_peerpidfd():
        raise OSError("this kernel has no SO_PEERPIDFD: Linux >= 6.5 is needed for now")
    os.umask(0o022)
    if not lock.take():
        raise OSError(f"another gatekeeper holds {lock.path}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sys.setswitchinterval(0.0005)
    _thread.stack_size(256 * 1024)
    return root


def main(argv: Sequence[str] | None = None, ledger_factory: Callable[[Path], Ledger] = Ledger) -> int:
    """Serve until SIGTERM; 1 and one line where it cannot, or can no longer."""
    options = _options(argv)
    lock = Lock(options.run_dir)
    try:
        root = _prepare(lock)
        gatekeeper = Gatekeeper(lock, partial(open_ledger, options.pins, ledger_factory), root)
    except OSError as error:
        print(f"fgpu gatekeeper: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, gatekeeper.end)
    signal.signal(signal.SIGINT, gatekeeper.end)
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"1")
        os.close(options.ready_fd)
    return 0 if gatekeeper.run() else 1


if __name__ == "__main__":
    sys.exit(main())
