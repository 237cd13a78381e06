"""Decides which tenants have been idle for long enough to be parked. Does no I/O and reads no clock.

One invariant: the idle time of a tenant is a time in which it was looked at often enough, and in which no look found a
sign of work. Whatever else happens (a call, a process that begins or ends, work on the device, a figure that is not
known, a pause of the agent, a time in the host's memory), the idle time begins anew.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

MOST_PAUSE = 5.0  # seconds between two looks; what happens in a longer time is not known
MOST_DOUBLINGS, MOST_AGAIN = 10, 3600.0


@dataclass(frozen=True, slots=True)
class Look:
    """The findings of a look at a tenant.

    `after`: the idle time after which it is parked, in seconds. `signs`: a value that changes with each call of its
    programs. `is_busy`: it runs work, or this is not known, or it is parked.
    """

    after: float
    signs: Hashable
    is_busy: bool


@dataclass(slots=True)
class Idle:
    """The idle time of a tenant. `since`: when it began. `failed_at`: the last attempt that failed, of `failures`.

    `signs`: of the last look; None: the next look has them. `is_tried`: it is being parked.
    """

    signs: Hashable | None
    since: float
    failed_at: float = 0.0
    failures: int = 0
    is_tried: bool = False


class Idleness:
    """The idle times of all tenants that are parked by themselves. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._idle: dict[int, Idle] = {}
        self._looked_at = float("-inf")

    def look(self, now: float, looks: Mapping[int, Look]) -> list[int]:
        """Take the findings of a look at all tenants, by cgroup.

        Returns:
            The tenants that are due to be parked, the longest idle first.
        """
        is_gap = now - self._looked_at > MOST_PAUSE
        was, self._idle, self._looked_at = self._idle, {}, now
        for cgroup, look in looks.items():
            idle = was.get(cgroup)
            if idle and idle.signs is None:
                idle.signs = look.signs
            if idle and idle.is_tried:  # the attempt itself changes the signs
                self._idle[cgroup] = idle
                continue
            if idle is None or is_gap or look.is_busy or idle.signs != look.signs:
                idle = Idle(look.signs, now)
            self._idle[cgroup] = idle
        due = [cgroup for cgroup, look in looks.items() if self.is_due(now, cgroup, look)]
        return sorted(due, key=lambda cgroup: self._idle[cgroup].since)

    def is_due(self, now: float, cgroup: int, look: Look) -> bool:
        """Return whether a tenant has been idle for `look.after`, including the new `look`, and can be tried."""
        idle = self._idle.get(cgroup)
        if idle is None or idle.is_tried or look.is_busy or idle.signs != look.signs:
            return False
        return now - self._looked_at <= MOST_PAUSE and not self.due_in(now, cgroup, look.after)

    def begin_anew(self, cgroup: int) -> None:
        """Let the idle time of a tenant begin at the next look."""
        self._idle.pop(cgroup, None)

    def tried(self, cgroup: int) -> None:
        """Record that an attempt to park a tenant has begun. It ends with failed() or begin_anew()."""
        if idle := self._idle.get(cgroup):
            idle.is_tried = True

    def failed(self, now: float, cgroup: int) -> None:
        """Record that a tenant could not be parked: it is tried again after twice the time, and so on up to an hour."""
        if idle := self._idle.get(cgroup):
            idle.failures, idle.failed_at = min(idle.failures + 1, MOST_DOUBLINGS), now
            if idle.is_tried:  # calls during the attempt are not known
                idle.signs, idle.since, idle.is_tried = None, now, False

    def seconds(self, now: float, cgroup: int) -> float:
        """Return for how long a tenant has been idle."""
        idle = self._idle.get(cgroup)
        return max(0.0, now - idle.since) if idle else 0.0

    def due_in(self, now: float, cgroup: int, after: float) -> float:
        """Return after how many seconds a tenant will be parked, if it stays idle. `after`: the necessary idle time."""
        idle = self._idle.get(cgroup)
        if idle is None:
            return after
        pause = max(after, min(after * 2**idle.failures, MOST_AGAIN)) if idle.failures else 0.0
        return max(0.0, max(idle.failed_at + pause, idle.since + after) - now)
