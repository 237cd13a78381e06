"""Orphaned bytes: charges that remain after their process has exited, or has exported and freed the memory.

The map `orphans` has one entry for each process, device and move of the process. Only BPF programs change the map. The
agent's reconcile thread reads the map and decides which bytes are released.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from fgpu_ebpf import abi
from fgpu_ebpf.linux import bpf

_KEY, _VALUE = struct.Struct("IIQQ"), struct.Struct(f"4Q{2 * abi.LEVELS}Q")
_U32 = struct.Struct("I")
_ORPHANED = slice(abi.UsagePage.orphaned.offset, abi.UsagePage.orphaned.offset + abi.UsagePage.orphaned.size)


@dataclass(frozen=True, slots=True)
class Orphan:
    """Orphaned bytes on one device.

    `tgid` and `generation` name the process that had the bytes. `turn` is the number of moves of this process until the
    bytes were orphaned. `since_ns`: when the first of the bytes were orphaned. `ended_ns`: when the process exited or
    executed another program; 0: the process still runs the program. `levels`: the cgroups that are charged, innermost
    first. Times are CLOCK_MONOTONIC.
    """

    tgid: int
    device: int
    generation: int
    turn: int
    bytes: int
    since_ns: int
    ended_ns: int
    levels: tuple[int, ...]


def orphan_of(raw_key: bytes, raw: bytes) -> Orphan:
    """Decode an entry of the map `orphans`."""
    tgid, device, generation, turn = _KEY.unpack(raw_key)
    bytes_, since_ns, ended_ns, _, *levels = _VALUE.unpack(raw)
    return Orphan(tgid, device, generation, turn, bytes_, since_ns, ended_ns, tuple(filter(None, levels[::2])))


class OrphanMap:
    """The map `orphans`.

    Args:
        maps: the ledger's open maps, by name.
        run: runs the BPF program `adjust` with its arguments.
        open_page: returns a new descriptor of a level's usage page, or None.
    """

    def __init__(
        self, maps: Mapping[str, int], run: Callable[..., int], open_page: Callable[[int], int | None]
    ) -> None:
        self._maps = maps
        self._run = run
        self._open_page = open_page
        self._empty_as_of = -1  # the map was empty when this many entries had ever been created
        self._mapped: dict[int, tuple[int, mmap.mmap]] = {}  # by level: the id of the page, and the page

    def _all(self) -> list[Orphan]:
        """Return all entries.

        An empty map takes as long to read as a full map, so an empty map is read only after entries were created.
        """
        so_far = bpf.number(self._maps["orphans_made"], 0)
        if so_far == self._empty_as_of:
            return []
        found = [orphan_of(key, raw) for key, raw in bpf.items(self._maps["orphans"], _KEY.size, _VALUE.size)]
        self._empty_as_of = -1 if found else so_far
        return found

    def entries(self) -> list[Orphan]:
        """Return all entries that have bytes."""
        return [orphan for orphan in self._all() if orphan.bytes]

    def forget_empty(self, living: Container[tuple[int, int]]) -> None:
        """Delete entries without bytes, except of `living` processes (pid, generation), which may add bytes."""
        for orphan in self._all():
            if not orphan.bytes and (orphan.tgid, orphan.generation) not in living:
                self.let_go(orphan, 0)

    def let_go(self, orphan: Orphan, bytes_: int) -> bool:
        """Release bytes of an orphan at its levels; 0 bytes: delete the orphan's entry if the entry has no bytes.

        Return False if the entry has changed or no longer exists. The caller must read the entry again.
        """
        key = orphan.tgid, orphan.device, orphan.generation, orphan.turn
        return self._run(abi.Adjust.LET_GO, *key, bytes_) == 0

    def of_level(self, cgroup: int) -> list[int]:
        """Return the orphaned bytes of a level by device, with the bytes that have no entry; empty without a page."""
        fd = self._open_page(cgroup)
        if fd is None:
            return []
        try:
            raw = bpf.lookup(fd, _U32.pack(0), ctypes.sizeof(abi.UsagePage))
        finally:
            os.close(fd)
        return list(abi.UsagePage.from_buffer_copy(raw).orphaned) if raw else []

    def levels_with_bytes(self, levels: Iterable[int], pages: Mapping[int, int]) -> list[int]:
        """Return those of the levels that have orphaned bytes. Only the reconcile thread may call this method.

        Each page is mapped once, because the reconcile thread checks many levels in each second.

        Args:
            levels: the cgroup ids of the levels.
            pages: the ids of the pages of all levels that have a page, by cgroup id.
        """
        self._mapped = {level: one for level, one in self._mapped.items() if pages.get(level) == one[0]}
        return [level for level in levels if level in pages and self._has_bytes(level, pages[level])]

    def _has_bytes(self, level: int, page: int) -> bool:
        if level not in self._mapped:
            fd = self._open_page(level)
            if fd is None:
                return False
            try:
                self._mapped[level] = page, mmap.mmap(fd, abi.PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
            finally:
                os.close(fd)
        return any(self._mapped[level][1][_ORPHANED])

    def disown(self, cgroup: int, device: int, bytes_: int) -> bool:
        """Release orphaned bytes of a level that have no entry. Return whether the bytes were released."""
        return self._run(abi.Adjust.DISOWN, cgroup, device, bytes_) == 0

    def looked(self, cgroup: int, device: int, since_ns: int) -> None:
        """Record on a level's page that at the time `since_ns` the device held all orphaned bytes of the level."""
        self._run(abi.Adjust.LOOKED, cgroup, device, since_ns)

    def managed_freed(self, device: int) -> int:
        """Return how many bytes of managed memory were ever freed on a device."""
        return bpf.number(self._maps["managed_freed"], device)
