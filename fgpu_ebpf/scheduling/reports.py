"""The reports of a tenant's processes about their work, for all processes together.

The module runs in threads of the gatekeeper that hold the time slicer's lock. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from typing import NamedTuple

ARRIVAL_NS = 200_000  # within this time, an arriving thread has observed that nothing is in flight any more


class Seen(NamedTuple):
    """The combined reports of a tenant's processes. `devices`: the devices on which the tenant has contexts. `drained`:
    each process has nothing in flight, or had nothing in flight at some time after the gates of the turn had closed.
    """

    devices: frozenset[int]
    waiting: bool = False
    launches: int = 0
    in_flight: int = 0
    busy_until_ns: int = 0  # when the work in flight should end
    drained: bool = True
    wanted_ns: int = 0  # when a thread last requested a launch; 0: not reported
    begun_ns: int = 0  # when a thread last passed a gate that had been closed
    ended_ns: int = 0  # when the last work in flight was observed to end
    idle_ns: int = 0  # the time with nothing in flight, by the ends and launches reported since the last check

    def was_found_on_arrival(self) -> bool:
        """Return whether the end of the work was observed by a thread that arrived at the closed gate after that end.

        A thread that waits for its work reports the end before the thread requests another launch.
        """
        return self.waiting and 0 <= self.ended_ns - self.wanted_ns <= ARRIVAL_NS


NOTHING = Seen(frozenset())
