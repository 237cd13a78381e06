"""Places of usage pages: the map in which the kernel finds a page by its number, where a cgroup id takes a search.

Owns: which place is whose. Never: decides who has a page. A place that is free keeps its last page until another takes
it: that page names no cgroup any more. On failure: OSError: E2BIG, every place is taken.
"""

from __future__ import annotations

import errno
import heapq
import struct
from collections.abc import Iterable, Mapping, Sequence

from fgpu_ebpf import bpf

PLACES = 4096
_U32 = struct.Struct("I")
_U64 = struct.Struct("Q")


class Shelf:
    """`maps` are the ledger's open maps, by name; nobody else may write these."""

    def __init__(self, maps: Mapping[str, int]) -> None:
        self._maps = maps
        self._places: dict[int, int] | None = None  # by cgroup; None: not looked at yet
        self._free: list[int] = []

    def _look(self) -> dict[int, int]:
        """What an agent before this one has placed."""
        if self._places is None:
            on_it = {page: place for place, page in self._entries("shelf", _U32)}
            held = ((cgroup, on_it.get(page)) for cgroup, page in self._entries("pages", _U64))
            self._places = {cgroup: place for cgroup, place in held if place is not None}
            self._free = sorted({*range(PLACES)} - {*self._places.values()})  # a heap
        return self._places

    def _entries(self, name: str, key: struct.Struct) -> list[tuple[int, int]]:
        found = bpf.items(self._maps[name], key.size, _U32.size, PLACES)
        return [(key.unpack(k)[0], _U32.unpack(page)[0]) for k, page in found]

    def take(self, cgroups: Sequence[int]) -> list[int]:
        """A place for the page of each."""
        places = self._look()
        if len(cgroups) > len(self._free):
            raise OSError(errno.E2BIG, "there are as many levels as there may be")
        taken = [heapq.heappop(self._free) for _ in cgroups]
        places |= dict(zip(cgroups, taken, strict=True))
        return taken

    def put(self, pages: Mapping[int, int]) -> None:
        """Puts pages, by descriptor, at their places."""
        bpf.update_all(self._maps["shelf"], {_U32.pack(place): _U32.pack(fd) for place, fd in pages.items()})

    def give_back(self, cgroups: Iterable[int]) -> None:
        """These have no page any more."""
        places = self._look()
        for cgroup in cgroups:
            place = places.pop(cgroup, None)
            if place is not None:
                heapq.heappush(self._free, place)
