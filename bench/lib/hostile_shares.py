"""The device time of honest programs, and how long their threads waited for a processor of the host.

`Waits` samples /proc/PID/task/TID/schedstat, where the kernel counts how long a thread was runnable without a
processor: for the thread of each honest program that launches, for the gatekeeper's that gives turns, and for the
server that is the simulated device. A program that waits for a processor needs no turn, and a device that does has no
time to give, so a program's part is one of the rest. The waits are added up, because each of these waits for the
others. Imports nothing of fgpu.
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
    """Return the nanoseconds for which the thread was runnable without a processor, so far; 0 if it has exited."""
    with contextlib.suppress(OSError):
        return int((task / "schedstat").read_text().split()[1])
    return 0


def slicer_of(pid: int) -> Path:
    """Return the thread of a gatekeeper that gives turns: it has run for longest, beside the main thread."""
    tasks = [task for task in Path(f"/proc/{pid}/task").iterdir() if task.name != str(pid)]
    return max(tasks, key=lambda task: int((task / "schedstat").read_text().split()[0]))


class Waits:
    """Samples of how long each of these threads has waited for a processor."""

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
        """Take no more samples."""
        self._ended.set()
        self._thread.join()

    def between_ns(self, which: int, begin_ns: int, end_ns: int) -> int:
        """Return how long that thread waited between the last samples before these times."""
        return self._until(which, end_ns) - self._until(which, begin_ns)

    def _until(self, which: int, at_ns: int) -> int:
        place = bisect.bisect_right(self._at_ns, at_ns)
        return self._waited[which][max(0, place - 1)] if self._at_ns else 0


class Progress:
    """The kernels that one honest program has completed, by its own record of its steps."""

    def __init__(self, record: Path) -> None:
        steps = [*struct.iter_unpack("=qqq", record.read_bytes())]
        self._begun, self._ended = [s[0] for s in steps], [s[1] for s in steps]
        self._done = [0, *itertools.accumulate(s[2] for s in steps)]

    def until(self, at_ns: int) -> float:
        """Return the kernels completed by then. Those of a step count as spread evenly over it."""
        place = bisect.bisect_right(self._ended, at_ns)
        if place == len(self._ended):
            return self._done[-1]
        begun, ended = self._begun[place], self._ended[place]
        part = max(0, at_ns - begun) / (ended - begun)
        return self._done[place] + part * (self._done[place + 1] - self._done[place])


@dataclass(frozen=True)
class Window:
    """Two seconds of one honest program. `points`: of all this time, above its part; `ready_points`: of the time in
    which neither its thread nor the gatekeeper's nor the device's waited for a processor.
    """

    program: int
    at_seconds: float
    points: float
    ready_points: float
    waited: float  # this part of the window
    own_waited: float  # of that, the program's thread


def windows(
    records: Sequence[Path], parts: Sequence[float], waits: Waits, begun_ns: int, ended_ns: int
) -> list[Window]:
    """Return all windows, 0.2 s apart. `waits` has a thread of each program, then those that all of them wait for."""
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
    """The time of all processors of the host so far, in seconds."""

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
        """Return the percentages that were idle, and that a hypervisor gave to other machines."""
        passed = max(self.passed - before.passed, 1e-9)
        return 100 * (self.idle - before.idle) / passed, 100 * (self.stolen - before.stolen) / passed
