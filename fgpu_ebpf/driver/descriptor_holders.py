"""Search for processes that keep an exited process's memory on a device, by their open descriptors of the driver.

A thread of the agent lists /proc/PID/fd, because a host may have many processes and the main thread must not wait.
Descriptors that are unread in the queue of a socket are not listed in /proc, so the result may be empty. The main loop
calls device_files() for the agent itself.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import NamedTuple

from fgpu_ebpf.linux import procfs

PERIOD_SECONDS = 5.0
AGE_NS = 1_000_000_000  # the driver may still be releasing younger orphans
MOST_PROCESSES, MOST_DESCRIPTORS = 4096, 65536  # read for one cgroup in one search
MOST_KEEPERS = 8
MOST_MAPS = 1 << 24  # bytes of /proc/PID/maps
PREFIX = "nvidia"  # /dev/nvidiactl, /dev/nvidia0, /dev/nvidia-uvm, in any folder


class Held(NamedTuple):
    """Orphaned memory of the exited process `pid`. `paths`: the cgroups to search, innermost first."""

    pid: int
    paths: tuple[str, ...]


class Keepers:
    """A search in a thread. look() sets the orphans to search for. of() returns the processes that were found."""

    def __init__(self) -> None:
        self._held: Sequence[Held] = ()
        self._found: Mapping[int, tuple[int, ...]] = {}
        self._parents: Mapping[int, int] = {}  # parents of the processes in _found
        self._thread: threading.Thread | None = None

    def look(self, held: Sequence[Held]) -> None:
        """Set the orphans to search for. The agent repeats this call. The thread runs as long as there are orphans."""
        self._held = held
        if not held:
            self._found = {}
        elif self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="keepers", daemon=True)
            self._thread.start()

    def of(self, pid: int) -> tuple[int, ...]:
        """Return the processes that may keep memory of an exited process, from the last search."""
        return self._found.get(pid, ())

    def parents_of(self, pid: int) -> tuple[int, ...]:
        """Return the parents of the processes that of() returns, in the same order; 0: unknown, or the host's init."""
        return tuple(self._parents.get(keeper, 0) for keeper in self.of(pid))

    def _run(self) -> None:
        while all_ := self._held:
            once = cache(search)  # one search of a cgroup for all of its orphans
            found = {held.pid: find(held, once) for held in all_}
            self._parents = {pid: parent(pid) for pids in found.values() for pid in pids}
            self._found = found
            time.sleep(PERIOD_SECONDS)


def search(path: str) -> list[int]:
    """Return the processes of a cgroup, and of all cgroups below, that have descriptors of the driver."""
    return _with_descriptors(_below(path))


def find(held: Held, search: Callable[[str], list[int]] = search) -> tuple[int, ...]:
    """Return processes with descriptors of the driver, from the innermost of the cgroups that has such a process.

    If some of these processes are relatives (is_relative()) of the exited process, only the relatives are returned. The
    result has at most MOST_KEEPERS processes.
    """
    found: list[int] = []
    for path in held.paths:
        found += [pid for pid in search(path) if pid not in found]
        if found:
            break
    relatives = [pid for pid in found if is_relative(pid, held.pid)]
    return tuple((relatives or found)[:MOST_KEEPERS])


def _below(path: str) -> Iterable[int]:
    """Yield the processes of a cgroup and of all cgroups below, at most MOST_PROCESSES."""
    inside = f"{path.rstrip('/')}/"
    found = (pid for pid in procfs.pids() if f"{procfs.cgroup_path(pid) or ''}/".startswith(inside))
    return islice(found, MOST_PROCESSES)


def _with_descriptors(pids: Iterable[int]) -> list[int]:
    left, found = MOST_DESCRIPTORS, []
    for pid in pids:
        names = descriptors(pid, left)
        left -= len(names)
        if any(os.path.basename(name).startswith(PREFIX) for name in names):
            found.append(pid)
    return found


def descriptors(pid: int, most: int) -> list[str]:
    """Return the targets of the first `most` descriptors of a process; empty: the process has exited."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd")[:most]:
            with contextlib.suppress(OSError):  # the descriptor was closed in the meantime
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def device_files(pid: int) -> list[str]:
    """Return the driver's device files that a process has open or mapped. The result is empty for an exited process."""
    found = set(descriptors(pid, MOST_DESCRIPTORS))
    with contextlib.suppress(OSError):
        lines = procfs.read(f"/proc/{pid}/maps", MOST_MAPS).decode(errors="replace").split("\n")
        found |= {words[5] for line in lines if len(words := line.split(maxsplit=5)) > 5}
    return sorted(path for path in found if os.path.basename(path).startswith(PREFIX))


def parent(pid: int) -> int:
    """Return the parent of a process, or 0 if the process has exited or its parent is the host's init."""
    try:
        found = int(procfs.read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return 0 if found == 1 else found


def is_relative(pid: int, of: int) -> bool:
    """Return whether a process is in the session or process group that another process leads or has led."""
    try:
        return of in (os.getpgid(pid), os.getsid(pid))
    except OSError:
        return False
