"""The slots of usage pages in the map `shelf`: BPF programs find a page by its slot without looking up a cgroup id.

This module runs in the agent's main thread. A free slot keeps its last page, whose cgroup id is cleared, until another
page gets the slot. Errors are OSError; E2BIG: all slots are in use.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import os
import struct
from collections.abc import Callable, Collection, Mapping, Sequence

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.map_in_map import MapInMapUpdates
from fgpu_ebpf.linux import bpf

PLACES = bpf.MOST_INNER
_U32 = struct.Struct("I")
_U64 = struct.Struct("Q")


class UsagePageTable:
    """The slots. `maps`: the ledger's open maps by name; no other object may write `pages` and `shelf`."""

    def __init__(self, maps: Mapping[str, int]) -> None:
        self._maps = maps
        self._updates = MapInMapUpdates()
        self._places: dict[int, int] | None = None  # by cgroup; None: not read yet
        self._free: list[int] = []

    def close(self) -> None:
        """Wait for the end of all updates of the maps."""
        self._updates.close()

    def make(self, new: Sequence[abi.UsagePage], over: Callable[[set[int]], object] | None = None) -> None:
        """Create pages and enter the pages in the maps `shelf` and `pages`. Raise OSError on failure.

        A page is frozen before the page is visible. Therefore a process that gets the page's descriptor can never write
        the page, even if the agent is killed during this call.

        Args:
            new: the contents of the pages. The `place` of each page is set.
            over: called with the cgroups of the pages, usually in another thread, when every BPF program that found no
                page for these cgroups has ended.
        """
        made: dict[int, int] = {}
        cgroups = [page.cgroup for page in new]
        try:
            for page, place in zip(new, self._take(cgroups), strict=True):
                page.place = place
                made[place] = bpf.create_array_page("fgpu_usage", ctypes.sizeof(page))
                bpf.update(made[place], _U32.pack(0), bytes(page))
                bpf.freeze(made[place])
            self._updates.put(self._maps["shelf"], {_U32.pack(place): _U32.pack(fd) for place, fd in made.items()})
            found = zip(cgroups, made.values(), strict=True)
            by_cgroup = {_U64.pack(cgroup): _U32.pack(fd) for cgroup, fd in found}
            self._updates.put(self._maps["pages"], by_cgroup, lambda: over and over({*cgroups}))
        finally:
            for fd in made.values():
                os.close(fd)

    def take_away(self, cgroups: Collection[int], over: Callable[[set[int]], object]) -> None:
        """Remove the pages of these cgroups. Cgroups without a page are skipped.

        `over` is called with the cgroups, usually in another thread, when no BPF program uses their pages any more.
        """
        gone = set(cgroups)
        self._updates.delete(self._maps["pages"], [*map(_U64.pack, gone)], lambda: over(gone))
        places = self._look()
        for place in [places.pop(cgroup) for cgroup in gone if cgroup in places]:
            heapq.heappush(self._free, place)

    def taken(self) -> int:
        """Return the number of pages."""
        return len(self._look())

    def _take(self, cgroups: Sequence[int]) -> list[int]:
        """Return a slot for the page of each cgroup."""
        places = self._look()
        if len(cgroups) > len(self._free):
            raise OSError(errno.E2BIG, "the maximum number of cgroups with a limit (levels) is reached")
        taken = [heapq.heappop(self._free) for _ in cgroups]
        places |= dict(zip(cgroups, taken, strict=True))
        return taken

    def _look(self) -> dict[int, int]:
        """Return the slots by cgroup, including the slots that an earlier agent has assigned."""
        if self._places is None:
            found = bpf.items(self._maps["pages"], _U64.size, _U32.size, PLACES)
            self._places = {_U64.unpack(cgroup)[0]: _place(_U32.unpack(page)[0]) for cgroup, page in found}
            self._free = sorted({*range(PLACES)} - {*self._places.values()})  # a sorted list, which is a heap
        return self._places


def _place(page: int) -> int:
    """Return the slot of a page, which the page itself contains. `page`: the id of the page's map.

    The slot was written before the map `pages` had the page.
    """
    fd = bpf.map_by_id(page)
    try:
        raw = bpf.lookup(fd, _U32.pack(0), ctypes.sizeof(abi.UsagePage))
    finally:
        os.close(fd)
    return int(abi.UsagePage.from_buffer_copy(raw or b"").place)
