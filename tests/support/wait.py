"""Wait for a condition, on a machine that other tests use too."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PRESSURE = Path("/proc/pressure/cpu")  # Linux 4.20
GROWTH, LONGEST_PAUSE_SECONDS = 1.2, 0.05
LONGEST = 10  # the factor by which a wait is extended, at most


class Timeout(AssertionError):
    """The error that a condition was not met in time."""


class Deadline:
    """The end of a number of quiet seconds.

    In these seconds no program waits for a processor, and the hypervisor takes no processor. Programs that wait for a
    processor are late without a defect. The kernel measures both times.
    """

    def __init__(self, seconds: float) -> None:
        self._quiet, self._any = quiet_seconds() + seconds, time.monotonic() + LONGEST * seconds

    def is_over(self) -> bool:
        """Return whether that time has passed."""
        return quiet_seconds() > self._quiet or time.monotonic() > self._any

    def left(self) -> float:
        """Return the seconds until the end, if no program waits for a processor until then."""
        return self._quiet - quiet_seconds()


def waited_seconds() -> float:
    """Return the seconds since boot in which a program waited for a processor; 0 if the kernel has no such figure."""
    found = re.search(r"^some .* total=(\d+)$", PRESSURE.read_text(), re.MULTILINE) if PRESSURE.exists() else None
    return int(found[1]) / 1e6 if found else 0.0


def stolen_seconds() -> float:
    """Return the seconds since boot that the hypervisor gave to other machines, as a mean of all processors."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = int(file.readline().split()[8])
    return ticks / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)


def quiet_seconds() -> float:
    """Return the seconds since some moment in which no program waited for a processor and the hypervisor took none."""
    return time.monotonic() - waited_seconds() - stolen_seconds()


def waited_here() -> float:
    """Return for how many seconds the calling thread has waited for a processor since its start."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def waiting_of(pid: int) -> Callable[[], float]:
    """Return a function that returns for how many seconds a process's threads together have waited for a processor.

    The seconds count from this call. A thread that has ended meanwhile does not count.
    """
    return _scheduled(pid, 1)


def running_of(pid: int) -> Callable[[], float]:
    """Return a function that returns for how many seconds a process's threads together have used a processor.

    The seconds count from this call. A thread that has ended meanwhile does not count.
    """
    return _scheduled(pid, 0)


def _scheduled(pid: int, field: int) -> Callable[[], float]:
    """Return a function that sums a field of schedstat, in seconds since this call."""

    def read() -> dict[str, int]:
        found = {}
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                found[task.name] = int((task / "schedstat").read_text().split()[field])
        return found

    before = read()
    return lambda: sum(ns - before.get(thread, 0) for thread, ns in read().items()) / 1e9


def eventually(look: Callable[[], T], seconds: float = 10.0, what: str = "", pause: float = 0.01) -> T:
    """Call a function until it returns a true value, and return that.

    Args:
        seconds: the longest wait, as for Deadline.
        what: the expected event or state, for the text of the error.
        pause: seconds after the first call. Later pauses are longer, since most calls make the agent work too.

    Raises:
        Timeout: the function has returned no true value in that time.
    """
    deadline = Deadline(seconds)
    while True:
        found = look()
        if found:
            return found
        if deadline.is_over():
            raise Timeout(f"not within {seconds} s: {what or look}: {found!r}")
        time.sleep(pause)
        pause = min(GROWTH * pause, LONGEST_PAUSE_SECONDS)


def steadily(look: Callable[[], object], for_seconds: float, within: float = 10.0, what: str = "") -> None:
    """Wait until a function has returned a true value at every call for `for_seconds`.

    Raises:
        Timeout: there was no such period within `within` seconds, which count as for Deadline.
    """
    deadline = Deadline(within)
    since = time.monotonic()
    while True:
        found = look()
        if not found:
            since = time.monotonic()
        elif time.monotonic() - since >= for_seconds:
            return
        if deadline.is_over():
            raise Timeout(f"not for {for_seconds} s within {within} s: {what or look}: {found!r}")
        time.sleep(0.01)


def remove_cgroup(folder: Path, seconds: float = 10.0) -> None:
    """Remove a cgroup as soon as its last thread has left it.

    Its cgroup.procs is empty before that: it does not list a process that has begun to exit in all of its threads, and
    until the last of them has left the cgroup, the kernel refuses rmdir with EBUSY.

    Raises:
        Timeout: a thread was left after that time, which counts as for Deadline.
    """

    def removed() -> bool:
        with contextlib.suppress(OSError):
            folder.rmdir()
        return not folder.exists()

    eventually(removed, seconds, f"an empty {folder}")
