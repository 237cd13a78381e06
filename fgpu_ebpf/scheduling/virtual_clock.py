"""Virtual time, floors and counters of each device.

The module runs in threads of the gatekeeper that hold the time slicer's lock. The module records the floors, and
`fair_queue` uses the floors in decisions. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fgpu_ebpf.scheduling.counters import DeviceCounts
from fgpu_ebpf.scheduling.fair_queue import Floor


class Clocks:
    """Clocks, floors and counters of all devices. A device without an entry has had no turn."""

    def __init__(self) -> None:
        self.floors: dict[int, Floor] = {}
        self.counts: dict[int, DeviceCounts] = {}
        self._clocks: dict[tuple[int, int], int] = {}  # (device, rank): the virtual time at which the last turn began

    def now(self, devices: Iterable[int], rank: int) -> dict[int, int]:
        """Return the virtual time, in nanoseconds, at which a tenant of this rank starts on each of these devices."""
        return {device: self._clocks.get((device, rank), 0) for device in devices}

    def advance(self, device: int, rank: int, virtual_ns: int) -> None:
        """Set the clock of a device, unless the clock is later already."""
        self._clocks[device, rank] = max(self._clocks.get((device, rank), 0), virtual_ns)

    def turn_begins(self, virtual_ns: Mapping[int, int], rank: int, lifted_ns: int = 0) -> None:
        """Record the beginning of a turn or of another quantum of a turn.

        `virtual_ns`: the owner's virtual time on each device of the turn. `lifted_ns`: the current time if
        the turn was granted against starvation (`fair_queue.Floor`), else 0.
        """
        for device, at_ns in virtual_ns.items():
            floor = self.floors.get(device, Floor())
            self.floors[device] = floor._replace(lifted_ns=lifted_ns) if lifted_ns else floor._replace(rank=rank)
            self.advance(device, rank, at_ns)

    def count(self, device: int) -> DeviceCounts:
        """Return the counters of a device."""
        return self.counts.setdefault(device, DeviceCounts())
