"""The cost of a tenant's launches while the tenant has the device alone.

Turns are exclusive, and a turn ends when all its launches are done. So the busy time of turns, divided by the launches
in them, is the time for which a launch keeps the device busy on average if no other tenant slows it down. The time
between the end of a tenant's work and its next launch does not depend on other tenants, so it is measured at any time.
Both together are the cost of a launch: a tenant that has the device alone makes launches that cost a second in a
second. `concurrent` multiplies the number of launches by this cost to get a tenant's progress. The module runs in
threads of the gatekeeper that hold the time slicer's lock. Times are in nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class AloneCost:
    """The mean cost of a launch. What was measured long ago counts less than what was measured last.

    `fresh_launches`, `fresh_ns`: the launches of turns since the last begin(), and the busy time of these turns.
    """

    fresh_launches: int = 0
    fresh_ns: int = 0
    _launches: int = 0
    _ns: int = 0
    _rested_launches: int = 0
    _rested_ns: int = 0

    def begin(self) -> None:
        """Begin a measurement. The result of the measurements before counts half as much as until now."""
        self._launches, self._ns = (self._launches + self.fresh_launches) // 2, (self._ns + self.fresh_ns) // 2
        self.fresh_launches = self.fresh_ns = 0
        self._rested_launches, self._rested_ns = self._rested_launches // 2, self._rested_ns // 2

    def learn(self, launches: int, busy_ns: int) -> None:
        """Add a turn with some launches, in which the device was busy for `busy_ns`."""
        if launches > 0 and busy_ns > 0:
            self.fresh_launches += launches
            self.fresh_ns += busy_ns

    def rested(self, launches: int, idle_ns: int) -> None:
        """Add some launches, and the time for which the tenant had no work between them."""
        self._rested_launches += launches
        self._rested_ns += idle_ns

    def of(self, launches: int) -> float:
        """Return the nanoseconds that these launches take alone; 0: no cost was measured yet."""
        measured = self._launches + self.fresh_launches
        if not measured:
            return 0.0
        idle_ns = self._rested_ns / self._rested_launches if self._rested_launches else 0.0
        return launches * ((self._ns + self.fresh_ns) / measured + idle_ns)

    @property
    def is_known(self) -> bool:
        """True if a cost was measured."""
        return self._launches + self.fresh_launches > 0
