"""The decision about which tenants have been idle for long enough to be parked.

This module does no I/O and reads no clock.

The invariant: during the idle time of a tenant the tenant was checked often enough, and no check found a sign of work.
Any other event begins a new idle time: a call, a process that begins or ends, work on the device, an unknown figure, a
pause of the agent, or a time in the host's memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

MOST_PAUSE = 5.0  # seconds between two checks; the events of a longer time are not known
MOST_DOUBLINGS, MOST_AGAIN = 10, 3600.0


@dataclass(frozen=True, slots=True)
class Look:
    """The results of one check of a tenant.

    `after`: the idle time after which the tenant is parked, in seconds. `signs`: a value that changes with each call of
    the tenant's programs. `is_busy`: the tenant runs work, may run work, or is parked.
    """

    after: float
    signs: Hashable
    is_busy: bool


@dataclass(slots=True)
class Idle:
    """The idle time of a tenant, from `since` on. `failed_at`: the time of the last of `failures` failed attempts.

    `signs`: the signs of the last check, or None until the next check. `is_tried`: the tenant is being parked.
    """

    signs: Hashable | None
    since: float
    failed_at: float = 0.0
    failures: int = 0
    is_tried: bool = False


class Idleness:
    """The idle times of all tenants that are parked automatically. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._idle: dict[int, Idle] = {}
        self._looked_at = float("-inf")

    def look(self, now: float, looks: Mapping[int, Look]) -> list[int]:
        """Record the results of a check of all tenants, by cgroup.

        Returns:
            The tenants that are due to be parked, sorted from the longest idle time to the shortest.
        """
        is_gap = now - self._looked_at > MOST_PAUSE
        was, self._idle, self._looked_at = self._idle, {}, now
        for cgroup, look in looks.items():
            idle = was.get(cgroup)
            if idle and idle.signs is None:
                idle.signs = look.signs
            if idle and idle.is_tried:  # the attempt to park the tenant changes the signs
                self._idle[cgroup] = idle
                continue
            if idle is None or is_gap or look.is_busy or idle.signs != look.signs:
                idle = Idle(look.signs, now)
            self._idle[cgroup] = idle
        due = [cgroup for cgroup, look in looks.items() if self.is_due(now, cgroup, look)]
        return sorted(due, key=lambda cgroup: self._idle[cgroup].since)

    def is_due(self, now: float, cgroup: int, look: Look) -> bool:
        """Return whether a tenant was idle for `look.after`, up to and including `look`, so that an attempt is due."""
        idle = self._idle.get(cgroup)
        if idle is None or idle.is_tried or look.is_busy or idle.signs != look.signs:
            return False
        return now - self._looked_at <= MOST_PAUSE and not self.due_in(now, cgroup, look.after)

    def begin_anew(self, cgroup: int) -> None:
        """Restart the idle time of a tenant at the next check."""
        self._idle.pop(cgroup, None)

    def tried(self, cgroup: int) -> None:
        """Record that an attempt to park a tenant has begun. The attempt ends with failed() or begin_anew()."""
        if idle := self._idle.get(cgroup):
            idle.is_tried = True

    def failed(self, now: float, cgroup: int) -> None:
        """Record that a tenant could not be parked.

        The delay before the next attempt doubles with each failure, up to an hour.
        """
        if idle := self._idle.get(cgroup):
            idle.failures, idle.failed_at = min(idle.failures + 1, MOST_DOUBLINGS), now
            if idle.is_tried:  # calls during the attempt are unknown
                idle.signs, idle.since, idle.is_tried = None, now, False

    def seconds(self, now: float, cgroup: int) -> float:
        """Return the seconds for which a tenant has been idle."""
        idle = self._idle.get(cgroup)
        return max(0.0, now - idle.since) if idle else 0.0

    def due_in(self, now: float, cgroup: int, after: float) -> float:
        """Return the seconds after which a tenant will be parked if it stays idle. `after`: the necessary idle time."""
        idle = self._idle.get(cgroup)
        if idle is None:
            return after
        pause = max(after, min(after * 2**idle.failures, MOST_AGAIN)) if idle.failures else 0.0
        return max(0.0, max(idle.failed_at + pause, idle.since + after) - now)
