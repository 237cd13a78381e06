"""Virtual time, floors and counters of each device.

`turns` uses this module, in the gatekeeper's time slicer thread; `fair_queue` decides by the floors that are recorded
here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fgpu_ebpf.scheduling.counters import DeviceCounts
from fgpu_ebpf.scheduling.fair_queue import Floor


class Clocks:
    """All devices of the host. A device without an entry is as new."""

    def __init__(self) -> None:
        self.floors: dict[int, Floor] = {}
        self.counts: dict[int, DeviceCounts] = {}
        self._clocks: dict[tuple[int, int], int] = {}  # (device, rank): virtual time of the last turn's beginning

    def now(self, devices: Collection[int], rank: int) -> int:
        """Return the virtual time, in nanoseconds, at which a tenant of this rank starts on these devices."""
        return min((self._clocks.get((device, rank), 0) for device in devices), default=0)

    def turn_begins(self, devices: Collection[int], rank: int, virtual_ns: int, lifted_ns: int = 0) -> None:
        """Record the beginning of a turn or of another quantum; `lifted_ns`: the time, if the floor gave the turn."""
        for device in devices:
            floor = self.floors.get(device, Floor())
            self.floors[device] = replace(floor, lifted_ns=lifted_ns) if lifted_ns else replace(floor, rank=rank)
            key = (device, rank)
            self._clocks[key] = max(self._clocks.get(key, 0), virtual_ns)

    def count(self, device: int) -> DeviceCounts:
        """Return the counters of a device."""
        return self.counts.setdefault(device, DeviceCounts())
