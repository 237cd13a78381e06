"""The bars of the hostile soak, and the processor time of agent and gatekeeper.

A *bar* is the highest permitted value of a figure. The module imports nothing of fgpu.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure with its highest permitted value."""

    name: str
    value: float
    unit: str
    most: float

    @property
    def is_met(self) -> bool:
        """True if the figure is not above the highest permitted value."""
        return self.value <= self.most

    def line(self) -> str:
        """Return the bar as a line of output."""
        most = f"at most {self.most:g} {self.unit}".rstrip()
        return f"hostile_bar_{self.name} {self.value:.2f}, {most}: {'met' if self.is_met else 'MISSED'}"


def highest_of_99_percent(values: Sequence[float]) -> float:
    """Return the 99th percentile of the values."""
    return sorted(values)[len(values) * 99 // 100]


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process, with all its threads and its ended children, by /proc/PID/stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(word) for word in fields[11:15]) / os.sysconf("SC_CLK_TCK")


class ProcessorUse:
    """The processor time of some processes since this object was created."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids, self._began = dict(pids), time.monotonic()
        self._before = {name: processor_seconds(pid) for name, pid in pids.items()}

    def percent(self) -> dict[str, float]:
        """Return the time of each process until now, in percent of the time of one processor."""
        passed = max(time.monotonic() - self._began, 1e-9)
        return {name: 100 * (processor_seconds(pid) - self._before[name]) / passed for name, pid in self._pids.items()}
