"""Of every device: where virtual time stands, when the floor lifted somebody there, and what is counted of its turns.

Owns: these. Never: decides who comes next (`scheduler` does, and reads the floors here). Cannot fail.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fgpu_ebpf.places import DeviceCounts
from fgpu_ebpf.scheduler import Floor


class Clocks:
    """All devices of the host; a device that nothing has happened on is as one that is new."""

    def __init__(self) -> None:
        self.floors: dict[int, Floor] = {}
        self.counts: dict[int, DeviceCounts] = {}
        self._clocks: dict[tuple[int, int], int] = {}  # (device, rank): virtual time of the last turn's beginning

    def now(self, devices: Collection[int], rank: int) -> int:
        """Where whoever joins there begins: among its equals."""
        return min((self._clocks.get((device, rank), 0) for device in devices), default=0)

    def turn_begins(self, devices: Collection[int], rank: int, virtual_ns: int, lifted_ns: int = 0) -> None:
        """A turn, or another quantum of one, of a tenant of this rank; `lifted_ns`: by the floor, then."""
        for device in devices:
            floor = self.floors.get(device, Floor())
            self.floors[device] = replace(floor, lifted_ns=lifted_ns) if lifted_ns else replace(floor, rank=rank)
            key = (device, rank)
            self._clocks[key] = max(self._clocks.get(key, 0), virtual_ns)

    def count(self, device: int) -> DeviceCounts:
        """What is counted of it."""
        return self.counts.setdefault(device, DeviceCounts())
