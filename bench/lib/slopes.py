"""The sizes of the services and of their kernel objects in long runs, and whether these sizes grow.

A slope is fitted by least squares to the means of minutes, with a separate level for each life of a process, because a
restarted process begins at another level. Sampling runs in its own thread. The module imports nothing of fgpu.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support import kernel

EVERY_SECONDS = 2.0
SETTLING_SECONDS = 60.0  # the first part of each life, which is left out because caches still fill
MINUTE = 60.0
MOST_POINTS = 300  # the maximum points of a line in the picture, which is part of a page
MAPS = ("pages", "resolved", "limits", "shares", "turns", "processes", "threads", "allocations", "counters", "files")
Key = tuple[str, int]  # (name of the size, pid of the process or 0)


@dataclass(frozen=True, slots=True)
class Slope:
    """A slope in units a minute, and half of its 95 % interval."""

    value: float
    within: float

    @property
    def may_be_none(self) -> bool:
        """True if the interval includes zero growth."""
        return self.value - self.within <= 0


class Watch(threading.Thread):
    """A thread that samples sizes from start() to end(). `pids` returns the current pid of each watched process."""

    def __init__(self, pids: Callable[[], Mapping[str, int]]) -> None:
        super().__init__(daemon=True)
        self._pids, self._ended = pids, threading.Event()
        self.samples: dict[Key, list[tuple[float, float]]] = collections.defaultdict(list)
        self.begun = time.monotonic()
        self.fault = ""  # the error that ended the sampling

    def run(self) -> None:
        try:
            while not self._ended.wait(EVERY_SECONDS):
                self._sample(time.monotonic() - self.begun)
        except Exception as error:
            self.fault = f"{type(error).__name__}: {error}"

    def _sample(self, now: float) -> None:
        for name, pid in self._pids().items():
            with contextlib.suppress(OSError, KeyError):  # the process may be exiting
                for what, value in _sizes(pid).items():
                    self.samples[f"{name}_{what}", pid].append((now, value))
        for name in MAPS:
            with contextlib.suppress(OSError, StopIteration, AssertionError):  # the maps may not be pinned now
                self.samples[f"map_{name}", 0].append((now, kernel.entries(name)))
        self.samples["bpf_objects", 0].append((now, len(kernel.in_the_kernel())))
        with contextlib.suppress(OSError):  # a folder may be removed meanwhile
            self.samples["run_files", 0].append((now, sum(1 for _ in Path("/run/fgpu").rglob("*"))))

    def end(self) -> None:
        """Stop the sampling and wait for its end."""
        self._ended.set()
        self.join()

    def names(self) -> list[str]:
        """Return the names of the watched sizes."""
        return sorted({name for name, _ in self.samples})

    def lives(self, name: str) -> list[list[tuple[float, float]]]:
        """Return the samples (seconds, value) of each life."""
        return [rows for (what, _), rows in self.samples.items() if what == name]

    def slope(self, name: str, late: bool = False) -> Slope | None:
        """Return the slope of a size; None: there are too few minutes.

        `late`: only the second half of each life counts, when the tables are full.
        """
        return slope([_minutes(rows, late) for rows in self.lives(name)])

    def write(self, path: Path) -> None:
        """Write all samples as CSV, with the columns what, life, seconds, value."""
        with open(path, "w", encoding="utf-8", newline="") as out:
            rows = csv.writer(out)
            rows.writerow(("what", "life", "seconds", "value"))
            for (name, life), samples in sorted(self.samples.items()):
                rows.writerows((name, life, f"{seconds:.1f}", value) for seconds, value in samples)


def _sizes(pid: int) -> dict[str, float]:
    """Return the resident memory in KiB and the numbers of descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "resident": float(fields["VmRSS"].split()[0]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
    }


def _minutes(rows: list[tuple[float, float]], late: bool) -> list[tuple[float, float]]:
    """Return (minutes, mean) of every whole minute of a life after SETTLING_SECONDS. `late`: of its second half."""
    begun = rows[0][0] + max(SETTLING_SECONDS, (rows[-1][0] - rows[0][0]) / 2 if late else 0)
    found = collections.defaultdict(list)
    for seconds, value in rows:
        if seconds >= begun:
            found[int((seconds - begun) // MINUTE)].append(value)
    last = max(found, default=0)
    return [(begun / MINUTE + n, sum(v) / len(v)) for n, v in sorted(found.items()) if n < last]


def slope(lives: list[list[tuple[float, float]]]) -> Slope | None:
    """Return the slope of all lives, by least squares over the deviations from the means of each life.

    None: there are fewer than two degrees of freedom.
    """
    import scipy.stats

    times: list[float] = []
    values: list[float] = []
    for rows in (rows for rows in lives if len(rows) > 1):
        middle, level = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        times += [at - middle for at, _ in rows]
        values += [value - level for _, value in rows]
    means = sum(len(rows) > 1 for rows in lives)
    free = len(times) - means - 1
    if free < 2:
        return None
    spread = sum(t * t for t in times)
    value = sum(t * v for t, v in zip(times, values, strict=True)) / spread
    left = sum((v - value * t) ** 2 for t, v in zip(times, values, strict=True))
    return Slope(value, float(scipy.stats.t.ppf(0.975, free)) * (left / free / spread) ** 0.5)


def plot(watch: Watch, names: list[str], path: Path) -> None:
    """Draw each size in its own row, with one line for each life."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(names), 1, sharex=True, figsize=(9, 1.6 * len(names)), layout="constrained")
    for name, row in zip(names, rows, strict=True):
        for life in watch.lives(name):
            shown = life[:: -(-len(life) // MOST_POINTS)]
            row.plot([seconds / MINUTE for seconds, _ in shown], [value for _, value in shown], linewidth=0.8)
        row.set_ylabel(name.replace("_", "\n", 1), rotation=0, ha="right", va="center")
        row.margins(x=0)
    rows[-1].set_xlabel("minutes")
    figure.savefig(path)
