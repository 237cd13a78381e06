"""The processes of a job, with checks that each process is the requested process and can execute the driver's calls.

A thread of a process copies the process's memory. Therefore a process that is stopped, traced or frozen would make a
call of the driver hang.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fgpu_ebpf.linux import procfs
from fgpu_ebpf.parker import threads
from fgpu_ebpf.parker.protocol import Named, RequestError

_STOPPED = {"T": "stopped", "t": "stopped by a debugger"}


class Process:
    """A process, held by its pidfd from the start of the job."""

    def __init__(self, named: Named) -> None:
        """Open the pidfd of the process. In a shortage of files or memory, raise OSError."""
        self.pid = named.pid
        self._started = named.started
        try:
            self._pidfd = os.pidfd_open(named.pid)
        except OSError as error:
            if error.errno in procfs.SHORTAGES:
                raise
            self._pidfd = -1
        if self._pidfd >= 0 and procfs.started(named.pid) != named.started:
            self.close()

    def close(self) -> None:
        """Close the pidfd."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def is_there(self) -> bool:
        """Return whether the process is alive, so that its pid cannot name another process."""
        return self._pidfd >= 0 and procfs.alive(self._pidfd) and procfs.started(self.pid) == self._started

    def check(self) -> None:
        """Check that the process is alive. Raise RequestError on failure."""
        if not self.is_there():
            raise RequestError(f"process {self.pid} has ended")

    def check_runs(self) -> None:
        """Check that the process is not stopped, traced or frozen. Raise RequestError on failure."""
        self.check()
        for thread in self._threads():
            state, tracer = _state_and_tracer(self.pid, thread)
            if tracer:
                raise RequestError(f"process {self.pid} is traced by process {tracer}")
            if state in _STOPPED:
                raise RequestError(f"process {self.pid} is {_STOPPED[state]}")
        for path, folder in cgroups(self.pid, "freezer"):
            if _is_frozen(folder):
                raise RequestError(f"process {self.pid} is in the frozen cgroup {path}")

    def is_quiet(self, until: float, now: Callable[[], float], sleep: Callable[[float], None]) -> bool:
        """Wait until no thread is in an earlier call. Return False if such a call cannot be excluded by `until`."""
        return threads.are_past(self.pid, until, now, sleep)

    def _threads(self) -> list[str]:
        with contextlib.suppress(OSError):
            return os.listdir(f"/proc/{self.pid}/task")
        return []


def _state_and_tracer(pid: int, thread: str) -> tuple[str, int]:
    """Return the state of a thread, as in /proc, and the pid of its tracer; 0: no tracer, or the thread has exited."""
    state, tracer = "", 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = procfs.read(f"/proc/{pid}/task/{thread}/status")
        state = procfs.field(status, b"State:").split()[0].decode()
        tracer = int(procfs.field(status, b"TracerPid:"))
    return state, tracer


def _is_frozen(folder: Path) -> bool:
    """Return whether a cgroup of version 2 or 1 is frozen or is being frozen."""
    for name, words in (
        ("cgroup.events", {"frozen 1"}), ("cgroup.freeze", {"1"}), ("freezer.state", {"FROZEN", "FREEZING"})
    ):  # fmt: skip
        with contextlib.suppress(OSError):
            if not words.isdisjoint((folder / name).read_text(encoding="ascii").split("\n")):
                return True
    return False


def cgroups(pid: int, controller: str) -> Iterator[tuple[str, Path]]:
    """Yield the path and the folder of a process's cgroup and of all enclosing cgroups, innermost first.

    The result includes the hierarchy of version 2, and the hierarchy of version 1 with the controller if that hierarchy
    exists. Raise RequestError if a cgroup lies outside the cgroup namespace of this process.
    """
    roots = _roots(controller)
    try:
        lines = procfs.read(f"/proc/{pid}/cgroup").decode(errors="surrogateescape").split("\n")
    except OSError:
        raise RequestError(f"process {pid} has ended") from None
    for line in filter(None, lines):
        _, controllers, path = line.split(":", 2)
        root = roots.get("" if not controllers else controller if controller in controllers.split(",") else None)
        if root is None:
            continue
        if procfs.is_outside(path):
            raise RequestError(f"process {pid} is in a cgroup outside the cgroup namespace of the parker: {path}")
        for above in procfs.and_above(path.removesuffix(" (deleted)")):
            yield above, root / above.lstrip("/")


def _roots(controller: str) -> dict[str | None, Path]:
    """Return the mount points of the hierarchies. The key is empty for version 2, and the controller for version 1."""
    found: dict[str | None, Path] = {}
    for mount in procfs.mounts():
        if mount.kind == "cgroup2":
            found.setdefault("", Path(mount.path))
        elif mount.kind == "cgroup" and controller in mount.options.split(","):
            found.setdefault(controller, Path(mount.path))
    return found
