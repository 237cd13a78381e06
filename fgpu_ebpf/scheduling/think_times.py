"""Think times: how long a tenant has nothing in flight between the end of a step and its next launch.

An owner without work keeps its turn for twice the think time that nine of ten of its recent ones do not exceed. Those
that are longer than any patience do not count, unless nearly all are. The owner pays for the time like for work, so a
wrong report gains nothing.

`turns` uses this module, in the gatekeeper's time slicer thread. Times are nanoseconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

IDLE_NS = 500_000  # the patience without measurements; less gains nothing, because checks are not more frequent
MOST_NS = 2_000_000  # the maximum; for short quanta this part of the quantum
QUANTUM_PARTS = 10
_RECENT = 16
_HOPE_PARTS = 4  # if fewer than this part of the think times are short enough, waiting is in vain


@dataclass(slots=True)
class ThinkTimes:
    """The recent think times of one tenant. Checks find long ones more often than short ones."""

    _recent: deque[int] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _known: tuple[int, int] = (0, IDLE_NS)  # a quantum, and the patience with it

    def add(self, ns: int) -> None:
        """Record a think time, as far as it was seen or reported."""
        self._recent.append(max(0, ns))
        self._known = (0, 0)

    def patience_ns(self, quantum_ns: int) -> int:
        """Return how long the owner keeps its turn without work."""
        if self._known[0] != quantum_ns:
            self._known = quantum_ns, self._learned_ns(most_patience_ns(quantum_ns))
        return self._known[1]

    def _learned_ns(self, most_ns: int) -> int:
        short = sorted(ns for ns in self._recent if ns <= most_ns)
        if not short or len(short) * _HOPE_PARTS < len(self._recent):
            return IDLE_NS
        return min(most_ns, max(IDLE_NS, 2 * short[len(short) * 9 // 10]))


def most_patience_ns(quantum_ns: int) -> int:
    """Return the most that an idle owner costs other tenants in one turn."""
    return max(IDLE_NS, min(MOST_NS, quantum_ns // QUANTUM_PARTS))
