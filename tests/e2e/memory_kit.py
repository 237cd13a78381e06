"""A cgroup of the memory controller for agent and gatekeeper, in the host's version of cgroups (1 or 2)."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.host import MIB, RUN_DIR, cgroup_root
from tests.support.wait import remove_cgroup

V1 = Path("/sys/fs/cgroup/memory")
PAGE = 4096
NO_LIMIT = {True: "max", False: "-1"}


class MemoryGroup:
    """A cgroup. Processes that are started within `entered` are in it. Version 2 throttles at `memory.high`. Version 1
    has no such file: it blocks processes at their limit while the out-of-memory killer is off.
    """

    def __init__(self) -> None:
        self.is_v2 = "memory" in (cgroup_root() / "cgroup.controllers").read_text().split()
        self._parent = cgroup_root() if self.is_v2 else V1
        assert self.is_v2 or V1.is_dir(), "no memory controller on this host"
        if self.is_v2:
            (self._parent / "cgroup.subtree_control").write_text("+memory")
        self.path = self._parent / f"fgpu-e2e-memory-{os.getpid()}"
        self.path.mkdir()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Move this process into the cgroup. Until it leaves, its children and its memory are charged there."""
        before = Path("/proc/self/cgroup").read_text().splitlines()
        mine = next(line.split(":", 2) for line in before if line.split(":")[1] == ("" if self.is_v2 else "memory"))
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self._parent / mine[2].lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))

    def leave(self, pid: int) -> None:
        """Move a process out of the cgroup. Its memory stays charged here."""
        (self._parent / "cgroup.procs").write_text(str(pid))

    def pids(self) -> set[int]:
        """Return the processes in it."""
        return set(map(int, (self.path / "cgroup.procs").read_text().split()))

    def waits(self) -> int:
        """Return how often a process in the cgroup needed a page while the cgroup was at its limit."""
        if not self.is_v2:
            return int((self.path / "memory.failcnt").read_text())
        events = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
        return int(events["high"]) + int(events["max"])

    def _usage(self) -> int:
        return int((self.path / ("memory.current" if self.is_v2 else "memory.usage_in_bytes")).read_text())

    def throttle(self) -> None:
        """Give its processes less memory than they need."""
        if self.is_v2:
            (self.path / "memory.high").write_text(str(self._usage() // 2))
            return
        (self.path / "memory.oom_control").write_text("1")
        self._limit_v1(MIB // 4)

    def kill(self) -> None:
        """Let the kernel kill the next process that needs another page.

        A second call removes pages that processes have freed since, because with spare pages the remaining processes
        might never need another page.
        """
        if self.is_v2:
            (self.path / "memory.max").write_text(str(MIB))
            return
        (self.path / "memory.oom_control").write_text("0")
        self._limit_v1(MIB // 4, PAGE)

    def has_killed(self, pids: set[int], where: Callable[[], set[int]]) -> bool:
        """Return whether all of these processes have been killed. Remove spare pages from processes that still live."""
        if pids & where():
            self.kill()
        return not pids & where()

    def _limit_v1(self, *steps: int) -> None:
        """Set the lowest limit that the kernel accepts: it refuses a limit below what cannot be reclaimed.

        Args:
            steps: bytes by which the limit falls; the last step is how much spare memory may remain.
        """
        for step in steps:
            with contextlib.suppress(OSError):
                for limit in range(self._usage(), 0, -step):
                    (self.path / "memory.limit_in_bytes").write_text(str(limit))

    def release(self) -> None:
        """Remove the limit."""
        for name in ("memory.high", "memory.max") if self.is_v2 else ("memory.limit_in_bytes",):
            (self.path / name).write_text(NO_LIMIT[self.is_v2])
        if not self.is_v2:  # wake waiting processes again: a process may have begun to wait since the first time
            (self.path / "memory.oom_control").write_text("0")

    def close(self) -> None:
        """Move remaining processes out of the cgroup, and remove it."""
        self.release()
        for pid in self.pids():
            self.leave(pid)
        remove_cgroup(self.path)


@contextlib.contextmanager
def questions() -> Iterator[None]:
    """Send requests to agent and gatekeeper without pause, so that both need memory. Do not wait for the replies."""
    ended = threading.Event()
    threads = [threading.Thread(target=_ask, args=(ended, *which)) for which in DOORS]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


REQUEST = b'{"verb": "put", "target": "' + b"x" * 60_000 + b'"}\n'
DOORS = (
    (RUN_DIR / "control.sock", socket.SOCK_STREAM, REQUEST),
    (RUN_DIR / "shim/shim.sock", socket.SOCK_SEQPACKET, b"no hello"),
)


def _ask(ended: threading.Event, door: Path, kind: int, said: bytes) -> None:
    open_: list[socket.socket] = []
    while not ended.is_set():
        with contextlib.suppress(OSError):
            one = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
            open_.append(one)
            one.connect(str(door))
            one.send(said)
        for old in open_[:-32]:
            old.close()
        del open_[:-32]
        time.sleep(0.002)
    for one in open_:
        one.close()
