"""Usage pages, as everybody may read them: limit, used and peak of each device of a level.

Owns: the read-only mappings of pages that were looked at. Never: writes one; BPF programs alone can. On failure: None
where a level has no page.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fgpu_ebpf import pages

_NUMBERS = struct.Struct("4Q")
_TALLY = struct.Struct("2Q")
_ORPHANED = struct.Struct("Q")


@dataclass(frozen=True, slots=True)
class Usage:
    """One device of one level, in bytes; `refused` is a count."""

    limit: int
    used: int
    peak: int
    refused: int
    admitted: int
    witnessed: int
    orphaned: int


class UsagePages:
    """Pages by cgroup id, mapped when first looked at. `open_page` answers a descriptor of a page, or None."""

    def __init__(self, open_page: Callable[[int], int | None]) -> None:
        self._open_page = open_page
        self._mapped: dict[int, mmap.mmap] = {}

    def read(self, cgroup: int, devices: Iterable[int]) -> list[Usage] | None:
        """The level's usage of these devices; each number is of one moment, together they may be of several."""
        page = self._page(cgroup)
        return None if page is None else [_usage(page, device) for device in devices]

    def _page(self, cgroup: int) -> mmap.mmap | None:
        if cgroup not in self._mapped:
            fd = self._open_page(cgroup)
            if fd is None:
                return None
            try:
                self._mapped[cgroup] = mmap.mmap(fd, pages.PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
            finally:
                os.close(fd)
        return self._mapped[cgroup]

    def forget(self, cgroup: int) -> None:
        """The level's page is another from now on, or none."""
        page = self._mapped.pop(cgroup, None)
        if page:
            page.close()

    def close(self) -> None:
        """Unmaps all."""
        for cgroup in list(self._mapped):
            self.forget(cgroup)


def _usage(page: mmap.mmap, device: int) -> Usage:
    at = pages.UsagePage
    numbers = _NUMBERS.unpack_from(page, at.devices.offset + device * ctypes.sizeof(pages.Usage))
    tally = _TALLY.unpack_from(page, at.tallies.offset + device * ctypes.sizeof(pages.Tally))
    return Usage(*numbers, *tally, *_ORPHANED.unpack_from(page, at.orphaned.offset + device * _ORPHANED.size))
