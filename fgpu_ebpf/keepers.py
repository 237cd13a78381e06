"""Which processes keep memory of an ended process on a device: those that have descriptors of the driver open.

A thread of its own lists /proc/PID/fd, because a host may have many processes: the agent's loop does not wait for it.
What lies unread in a socket's queue is in no process's list, so the answer may be empty.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fgpu_ebpf import procfs

PERIOD_SECONDS = 5.0
AGE_NS = 1_000_000_000  # younger orphans are those of processes that the driver is just taking down
MOST_PROCESSES, MOST_DESCRIPTORS = 4096, 65536  # of one look
MOST_KEEPERS = 8
PREFIX = "nvidia"  # /dev/nvidiactl, /dev/nvidia0, /dev/nvidia-uvm, wherever the nodes are


@dataclass(frozen=True, slots=True)
class Held:
    """Memory of process `pid`. `paths`: the cgroups in which to look, innermost first."""

    pid: int
    paths: tuple[str, ...]


class Keepers:
    """`look` says what is held, from time to time; `of` returns what was found."""

    def __init__(self) -> None:
        self._held: Sequence[Held] = ()
        self._found: Mapping[int, tuple[int, ...]] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self, held: Sequence[Held]) -> None:
        """These are held now; the thread begins with the first."""
        self._held = held
        if not held:
            self._found = {}
            return
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="keepers", daemon=True)
            self._thread.start()

    def of(self, pid: int) -> tuple[int, ...]:
        """Processes that may keep memory of an ended process, as far as they were found."""
        return self._found.get(pid, ())

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            self._found = {held.pid: find(held) for held in self._held}
            time.sleep(PERIOD_SECONDS)


def find(held: Held) -> tuple[int, ...]:
    """Processes in the cgroups of an ended process, innermost first, that have descriptors of the driver."""
    found: list[int] = []
    for path in held.paths:
        found += [pid for pid in _with_descriptors(_below(path)) if pid not in found]
        if found:
            break
    relatives = [pid for pid in found if is_relative(pid, held.pid)]
    return tuple((relatives or found)[:MOST_KEEPERS])


def _below(path: str) -> Iterable[int]:
    """Processes of a cgroup and those below it."""
    inside = f"{path.rstrip('/')}/"
    return (pid for pid in procfs.pids()[:MOST_PROCESSES] if f"{procfs.cgroup_path(pid) or ''}/".startswith(inside))


def _with_descriptors(pids: Iterable[int]) -> list[int]:
    left, found = MOST_DESCRIPTORS, []
    for pid in pids:
        names = descriptors(pid, left)
        left -= len(names)
        if any(os.path.basename(name).startswith(PREFIX) for name in names):
            found.append(pid)
    return found


def descriptors(pid: int, most: int) -> list[str]:
    """What the first descriptors of a process lead to; empty: it is gone."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd")[:most]:
            with contextlib.suppress(OSError):  # closed meanwhile
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def is_relative(pid: int, of: int) -> bool:
    """A process is in the session or the process group of another, which may have ended."""
    try:
        return of in (os.getpgid(pid), os.getsid(pid))
    except OSError:
        return False
