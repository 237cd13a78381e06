"""The device time of honest programs, and how long their threads waited for a processor of the host.

`Waits` samples /proc/PID/task/TID/schedstat, where the kernel counts how long a thread was runnable without a
processor. The threads are those of each honest program that launch, the gatekeeper's slicer thread, and the server of
the simulated device. While a program waits for a processor it needs no turn, and while the simulated device waits for a
processor it does no work. So the part of a program is computed from the remaining time. The waits of the threads are
added, because each of these threads waits for the other threads. The module imports nothing of fgpu.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KERNEL_NS, WINDOW_NS = 200_000, 2_000_000_000
SAMPLE_SECONDS = 0.05


def _waited_ns(task: Path) -> int:
    """Return the total nanoseconds for which a thread was runnable without a processor; 0 if it has exited."""
    with contextlib.suppress(OSError):
        return int((task / "schedstat").read_text().split()[1])
    return 0


def slicer_of(pid: int) -> Path:
    """Return the slicer thread of a gatekeeper: except for the main thread, it has run for the longest time."""
    tasks = [task for task in Path(f"/proc/{pid}/task").iterdir() if task.name != str(pid)]
    return max(tasks, key=lambda task: int((task / "schedstat").read_text().split()[0]))


class Waits:
    """A thread that samples how long each of `tasks` has waited for a processor, until end()."""

    def __init__(self, tasks: Sequence[Path]) -> None:
        self.number = len(tasks)
        self._tasks, self._ended = tasks, threading.Event()
        self._at_ns: list[int] = []
        self._waited: list[list[int]] = [[] for _ in tasks]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self._at_ns.append(time.monotonic_ns())
            for task, waited in zip(self._tasks, self._waited, strict=True):
                waited.append(max(_waited_ns(task), waited[-1] if waited else 0))

    def end(self) -> None:
        """Stop the sampling."""
        self._ended.set()
        self._thread.join()

    def between_ns(self, which: int, begin_ns: int, end_ns: int) -> int:
        """Return how long thread number `which` waited between the last samples before these times."""
        return self._until(which, end_ns) - self._until(which, begin_ns)

    def _until(self, which: int, at_ns: int) -> int:
        place = bisect.bisect_right(self._at_ns, at_ns)
        return self._waited[which][max(0, place - 1)] if self._at_ns else 0


class Progress:
    """The CUDA kernels that an honest program has completed, by its record of (begin, end, kernels) for each step."""

    def __init__(self, record: Path) -> None:
        steps = [*struct.iter_unpack("=qqq", record.read_bytes())]
        self._begun, self._ended = [s[0] for s in steps], [s[1] for s in steps]
        self._done = [0, *itertools.accumulate(s[2] for s in steps)]

    def until(self, at_ns: int) -> float:
        """Return the number of kernels that were completed at a time. The kernels of a step count as evenly spaced."""
        place = bisect.bisect_right(self._ended, at_ns)
        if place == len(self._ended):
            return self._done[-1]
        begun, ended = self._begun[place], self._ended[place]
        part = max(0, at_ns - begun) / (ended - begun)
        return self._done[place] + part * (self._done[place + 1] - self._done[place])


@dataclass(frozen=True)
class Window:
    """Two seconds of one honest program.

    `points` is its share of the device's time minus its part by weight, in percentage points. `ready_points` is the
    same for the time in which no thread of program, gatekeeper or simulated device waited for a processor.
    """

    program: int
    at_seconds: float
    points: float
    ready_points: float
    waited: float  # the part of the window in which one of these threads waited
    own_waited: float  # the part in which the program's thread waited


def windows(
    records: Sequence[Path], parts: Sequence[float], waits: Waits, begun_ns: int, ended_ns: int
) -> list[Window]:
    """Return all windows of all programs, 0.2 s apart.

    Args:
        records: the programs' records of their steps.
        parts: the part of each program by its weight.
        waits: the samples: first one thread of each program, then the threads that all programs wait for.
        begun_ns: the begin of the first window.
        ended_ns: the time before which the last window must end.
    """
    begins, shared = range(begun_ns, ended_ns - WINDOW_NS, WINDOW_NS // 10), range(len(records), waits.number)
    return [
        window
        for n, (record, part) in enumerate(zip(records, parts, strict=True))
        for window in _windows_of(n, Progress(record), part, waits, begins, shared)
    ]


def _windows_of(
    n: int, progress: Progress, part: float, waits: Waits, begins: range, shared: Iterable[int]
) -> Iterator[Window]:
    for at in begins:
        end = at + WINDOW_NS
        device_ns = (progress.until(end) - progress.until(at)) * KERNEL_NS
        own_ns = waits.between_ns(n, at, end)
        waited_ns = own_ns + sum(waits.between_ns(which, at, end) for which in shared)
        ready_ns = max(WINDOW_NS - waited_ns, WINDOW_NS // 100)
        points = [100 * (device_ns / ns - part) for ns in (WINDOW_NS, ready_ns)]
        seconds = (at - begins.start) / 1e9
        yield Window(n, seconds, points[0], points[1], waited_ns / WINDOW_NS, own_ns / WINDOW_NS)


@dataclass(frozen=True)
class Processors:
    """The total time of all processors since the host's boot, in seconds."""

    passed: float
    idle: float
    stolen: float

    @classmethod
    def now(cls) -> Processors:
        """Return the current values of /proc/stat."""
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in file.readline().split()[1:9]]
        return cls(sum(ticks), ticks[3] + ticks[4], ticks[7])

    def since(self, before: Processors) -> tuple[float, float]:
        """Return the percentages of idle time and of stolen time, in which the hypervisor ran other machines."""
        passed = max(self.passed - before.passed, 1e-9)
        return 100 * (self.idle - before.idle) / passed, 100 * (self.stolen - before.stolen) / passed
