"""Think times: the times in which a tenant has nothing in flight between the end of a step and its next launch.

An owner without work keeps its turn for some time, its *patience*. The patience is twice the 90th percentile of the
owner's recent think times, within the bounds below. Think times above the maximum of the patience are left out. If more
than three quarters of the think times are above the maximum, the patience is IDLE_NS. The owner is charged for this
time as for work, so a wrong report gains nothing.

The module runs in the gatekeeper's time slicer thread. Times are in nanoseconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

IDLE_NS = 500_000  # the minimum, and the patience without measurements; checks are not frequent enough for less
MOST_NS = 2_000_000  # the maximum
QUANTUM_PARTS = 10  # for short quanta the maximum is 1/10 of the quantum
_RECENT = 16  # the number of think times that are kept
_HOPE_PARTS = 4  # if fewer than 1/4 of the think times are short enough, a longer patience is useless


@dataclass(slots=True)
class ThinkTimes:
    """The recent think times of one tenant. Checks find long think times more often than short think times."""

    _recent: deque[int] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _known: tuple[int, int] = (0, IDLE_NS)  # a quantum, and the patience that was computed for this quantum

    def add(self, ns: int) -> None:
        """Record a think time. `ns`: the part of the think time that was measured or reported."""
        self._recent.append(max(0, ns))
        self._known = (0, 0)

    def patience_ns(self, quantum_ns: int) -> int:
        """Return how long the owner keeps its turn without work."""
        if self._known[0] != quantum_ns:
            self._known = quantum_ns, self._learned_ns(quantum_ns)
        return self._known[1]

    def are_short(self, quantum_ns: int) -> bool:
        """Return whether the next launch probably follows within the maximum patience. True without measurements."""
        return len(self._short(quantum_ns)) * _HOPE_PARTS >= len(self._recent)

    def _short(self, quantum_ns: int) -> list[int]:
        most_ns = most_patience_ns(quantum_ns)
        return sorted(ns for ns in self._recent if ns <= most_ns)

    def _learned_ns(self, quantum_ns: int) -> int:
        short = self._short(quantum_ns)
        if not short or not self.are_short(quantum_ns):
            return IDLE_NS
        return min(most_patience_ns(quantum_ns), max(IDLE_NS, 2 * short[len(short) * 9 // 10]))


def most_patience_ns(quantum_ns: int) -> int:
    """Return the maximum of the patience, which is also the most that an idle owner costs other tenants in one turn."""
    return max(IDLE_NS, min(MOST_NS, quantum_ns // QUANTUM_PARTS))
