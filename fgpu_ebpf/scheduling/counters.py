"""Counters of turns, by tenant and by device.

The module runs in threads of the gatekeeper that hold the time slicer's lock. The time slicer publishes the counters.
Times are in nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BUCKETS_NS = tuple(int(ms * 1e6) for ms in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 512))  # lengths of drains


@dataclass(slots=True)
class Counts:
    """Counters of one tenant. The counters never decrease."""

    owned_ns: int = 0
    waits: int = 0
    wait_ns: int = 0
    overruns: int = 0
    switches: int = 0
    throttled: int = 0


@dataclass(slots=True)
class DeviceCounts:
    """Counters of one device. The counters never decrease.

    `drains`: the number of drains in each bucket, then the number of longer drains. BUCKETS_NS has the buckets' upper
    bounds.
    """

    switches: int = 0
    overruns: int = 0
    lent_ns: int = 0  # the time for which all tenants could launch at the same time
    drain_ns: int = 0
    drains: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_NS) + 1))

    def add(self, ns: int, overrun: bool) -> None:
        """Count a turn that has ended. `ns`: the length of its drain."""
        self.drains[sum(ns > bucket for bucket in BUCKETS_NS)] += 1
        self.drain_ns += ns
        self.overruns += overrun
