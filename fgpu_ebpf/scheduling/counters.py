"""Counters of turns, by tenant and by device.

`turns` uses this module, in the gatekeeper's time slicer thread, which publishes the counters. Times are nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BUCKETS_NS = tuple(int(ms * 1e6) for ms in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 512))  # of drains


@dataclass(slots=True)
class Counts:
    """Counters of one tenant, only growing."""

    owned_ns: int = 0
    waits: int = 0
    wait_ns: int = 0
    overruns: int = 0
    switches: int = 0
    throttled: int = 0


@dataclass(slots=True)
class DeviceCounts:
    """Counters of one device, only growing. `drains`: how many took up to each of BUCKETS_NS, and longer."""

    switches: int = 0
    overruns: int = 0
    drain_ns: int = 0
    drains: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_NS) + 1))

    def add(self, ns: int, overrun: bool) -> None:
        """Count a turn that has ended."""
        self.drains[sum(ns > bucket for bucket in BUCKETS_NS)] += 1
        self.drain_ns += ns
        self.overruns += overrun
