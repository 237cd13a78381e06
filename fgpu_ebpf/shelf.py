"""Usage pages and their places: the map in which the kernel finds one by its number, where a cgroup id takes a search.

Owns: which page is whose, and where. Never: decides who has one, or changes what stands in it. A place that is free
keeps its last page until another takes it: that page names no cgroup any more. On failure: OSError: E2BIG, every place
is taken.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import os
import struct
from collections.abc import Callable, Collection, Mapping, Sequence

from fgpu_ebpf import bpf, pages
from fgpu_ebpf.graces import Graces

PLACES = bpf.MOST_INNER
_U32 = struct.Struct("I")
_U64 = struct.Struct("Q")


class Shelf:
    """`maps` are the ledger's open maps, by name; nobody else may write `pages` and `shelf`."""

    def __init__(self, maps: Mapping[str, int]) -> None:
        self._maps = maps
        self._graces = Graces()
        self._places: dict[int, int] | None = None  # by cgroup; None: not looked at yet
        self._free: list[int] = []

    def close(self) -> None:
        """Nothing uses the maps any more."""
        self._graces.close()

    def make(self, new: Sequence[pages.UsagePage], over: Callable[[set[int]], object] | None = None) -> None:
        """Puts pages where the kernel finds them. `over` is told of their cgroups, on another thread, when nobody is
        in the middle of finding none.

        Frozen before it is seen: whoever gets hold of a page never could write it, wherever this ends.
        """
        made: dict[int, int] = {}
        cgroups = [page.cgroup for page in new]
        try:
            for page, place in zip(new, self._take(cgroups), strict=True):
                page.place = place
                made[place] = bpf.create_array_page("fgpu_usage", ctypes.sizeof(page))
                bpf.update(made[place], _U32.pack(0), bytes(page))
                bpf.freeze(made[place])
            self._graces.put(self._maps["shelf"], {_U32.pack(place): _U32.pack(fd) for place, fd in made.items()})
            found = zip(cgroups, made.values(), strict=True)
            by_cgroup = {_U64.pack(cgroup): _U32.pack(fd) for cgroup, fd in found}
            self._graces.put(self._maps["pages"], by_cgroup, lambda: over and over({*cgroups}))
        finally:
            for fd in made.values():
                os.close(fd)

    def take_away(self, cgroups: Collection[int], over: Callable[[set[int]], object]) -> None:
        """These have no page any more, if they had one. `over` is told of them, on another thread, when nobody has what
        was theirs in hand.
        """
        gone = set(cgroups)
        self._graces.delete(self._maps["pages"], [*map(_U64.pack, gone)], lambda: over(gone))
        places = self._look()
        for place in [places.pop(cgroup) for cgroup in gone if cgroup in places]:
            heapq.heappush(self._free, place)

    def taken(self) -> int:
        """How many pages there are."""
        return len(self._look())

    def _take(self, cgroups: Sequence[int]) -> list[int]:
        """A place for the page of each."""
        places = self._look()
        if len(cgroups) > len(self._free):
            raise OSError(errno.E2BIG, "there are as many levels as there may be")
        taken = [heapq.heappop(self._free) for _ in cgroups]
        places |= dict(zip(cgroups, taken, strict=True))
        return taken

    def _look(self) -> dict[int, int]:
        """What an agent before this one has placed."""
        if self._places is None:
            found = bpf.items(self._maps["pages"], _U64.size, _U32.size, PLACES)
            self._places = {_U64.unpack(cgroup)[0]: _place(_U32.unpack(page)[0]) for cgroup, page in found}
            self._free = sorted({*range(PLACES)} - {*self._places.values()})  # a heap
        return self._places


def _place(page: int) -> int:
    """Where the page is, by its map's id: it says so itself, and was put there before its cgroup led to it."""
    fd = bpf.map_by_id(page)
    try:
        raw = bpf.lookup(fd, _U32.pack(0), ctypes.sizeof(pages.UsagePage))
    finally:
        os.close(fd)
    return int(pages.UsagePage.from_buffer_copy(raw or b"").place)
