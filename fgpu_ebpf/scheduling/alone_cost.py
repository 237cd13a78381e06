"""The cost of a tenant's launches while the tenant has the device alone.

Turns are exclusive, and a turn ends when all its launches are done. So the busy time of a turn, divided by the launches
in it, is the time for which a launch keeps the device busy on average if no other tenant slows it down. The time
between the end of a tenant's work and its next launch does not depend on other tenants, so it is measured at any time.
Both together are the cost of a launch: a tenant that has the device alone makes launches that cost a second in a
second. `concurrent` multiplies the number of launches by this cost to get a tenant's progress. The module runs in
threads of the gatekeeper that hold the time slicer's lock. Times are in nanoseconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

TURNS, FEWEST = 8, 2  # the turns that count, and how many are needed
STRANGE = 1.5  # if a launch of a turn costs this many times the median, the turn had other work (a start)


@dataclass(slots=True)
class AloneCost:
    """The mean cost of a launch in the last turns. Turns of earlier measurements count less.

    `fresh_launches`, `fresh_ns`: the launches of turns since the last begin(), and the busy time of these turns.
    """

    fresh_launches: int = 0
    fresh_ns: int = 0
    _turns: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=TURNS))  # launches and busy time
    _busy_ns: float = 0.0  # of a launch
    _rested_launches: int = 0
    _rested_ns: int = 0

    def begin(self) -> None:
        """Begin a measurement. What was measured before counts half as much as until now."""
        self.fresh_launches = self.fresh_ns = 0
        self._turns = deque(((count / 2, ns / 2) for count, ns in self._turns if count >= 2), TURNS)
        self._rested_launches, self._rested_ns = self._rested_launches // 2, self._rested_ns // 2

    def forget(self) -> None:
        """Discard all measurements, because they are wrong for the work that the tenant does now."""
        self._turns.clear()
        self.fresh_launches = self.fresh_ns = self._rested_launches = self._rested_ns = 0

    def learn(self, launches: int, busy_ns: int) -> None:
        """Add a turn with some launches, in which the device was busy for `busy_ns`."""
        if launches <= 0 or busy_ns <= 0:
            return
        self.fresh_launches += launches
        self.fresh_ns += busy_ns
        self._turns.append((launches, busy_ns))
        most = STRANGE * self._median_ns()
        usual = [(count, ns) for count, ns in self._turns if ns <= most * count]
        self._busy_ns = sum(ns for _, ns in usual) / sum(count for count, _ in usual)

    def _median_ns(self) -> float:
        """Return the cost of a launch in the turn with which half of all launches were as cheap, or cheaper."""
        half = sum(count for count, _ in self._turns) / 2
        for count, ns in sorted(self._turns, key=lambda turn: turn[1] / turn[0]):
            half -= count
            if half <= 0:
                return ns / count
        return 0.0  # there was no turn

    def rested(self, launches: int, idle_ns: int) -> None:
        """Add some launches, and the time for which the tenant had no work between them."""
        self._rested_launches += launches
        self._rested_ns += idle_ns

    def of(self, launches: int) -> float:
        """Return the nanoseconds that these launches take alone; 0: no cost was measured yet."""
        if not self.is_known:
            return 0.0
        idle_ns = self._rested_ns / self._rested_launches if self._rested_launches else 0.0
        return launches * (self._busy_ns + idle_ns)

    @property
    def is_known(self) -> bool:
        """True if the cost was measured in enough turns."""
        return len(self._turns) >= FEWEST
