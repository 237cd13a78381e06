"""Read-only mappings of usage pages: limit, used and peak of each device of a level.

This module runs in the thread that has opened the ledger.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fgpu_ebpf import abi

_NUMBERS = struct.Struct("4Q")
_TALLY = struct.Struct("2Q")
_U64, _OPENS = struct.Struct("Q"), struct.Struct(f"{abi.OPENS}Q")


class Usage(NamedTuple):
    """The numbers of one level on one device, in bytes; `refused` is a count.

    `used`: bytes that count as held by the device. `parked`: bytes of parked processes, which the level's own limit has
    to cover too, unlike the limits of the levels around this level. `called_ns`: when a program of the level last
    reported a call of the driver, on whichever device; 0: never.
    """

    limit: int
    used: int
    peak: int
    refused: int
    admitted: int
    witnessed: int
    orphaned: int
    parked: int = 0
    called_ns: int = 0


class UsagePages:
    """Pages by cgroup id, mapped at the first read. `open_page` returns a new descriptor of a level's page, or None."""

    def __init__(self, open_page: Callable[[int], int | None]) -> None:
        self._open_page = open_page
        self._mapped: dict[int, mmap.mmap] = {}

    def read(self, cgroup: int, devices: Iterable[int]) -> list[Usage] | None:
        """Return the level's usage of these devices, or None if the level has no page.

        Each number is exact, but different numbers may have been read at different moments.
        """
        page = self._page(cgroup)
        return None if page is None else [_usage(page, device) for device in devices]

    def opens(self, cgroup: int) -> tuple[int, int]:
        """Return the numbers of refused and allowed opens of device nodes by processes of a level without the shim."""
        page = self._page(cgroup)
        return (0, 0) if page is None else _OPENS.unpack_from(page, abi.UsagePage.opens.offset)

    def _page(self, cgroup: int) -> mmap.mmap | None:
        if cgroup not in self._mapped:
            fd = self._open_page(cgroup)
            if fd is None:
                return None
            try:
                self._mapped[cgroup] = mmap.mmap(fd, abi.PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
            finally:
                os.close(fd)
        return self._mapped[cgroup]

    def forget(self, cgroup: int) -> None:
        """Unmap the page of a level, because the page is removed or replaced."""
        page = self._mapped.pop(cgroup, None)
        if page:
            page.close()

    def close(self) -> None:
        """Unmap all pages."""
        for cgroup in list(self._mapped):
            self.forget(cgroup)


def _usage(page: mmap.mmap, device: int) -> Usage:
    at = abi.UsagePage
    parked = _U64.unpack_from(page, at.parked.offset + device * _U64.size)[0]
    limit, used, peak, refused = _NUMBERS.unpack_from(page, at.devices.offset + device * ctypes.sizeof(abi.Usage))
    admitted, witnessed = _TALLY.unpack_from(page, at.tallies.offset + device * ctypes.sizeof(abi.Tally))
    orphaned = _U64.unpack_from(page, at.orphaned.offset + device * _U64.size)[0]
    (called_ns,) = _U64.unpack_from(page, at.called_ns.offset)
    return Usage(limit, max(0, used - parked), peak, refused, admitted, witnessed, orphaned, parked, called_ns)
