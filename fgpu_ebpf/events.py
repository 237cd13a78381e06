"""The kernel's rare events, from the ring buffer that its programs fill.

Owns: the reader's place in the ring. Never: waits, or loses one silently: the kernel counts what did not get in. On
failure: OSError where there is no ring; a record of another layout is left out.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fgpu_ebpf import pages

_PAGE = mmap.PAGESIZE
_WORD = struct.Struct("Q")
_LENGTH = struct.Struct("I")
_BUSY, _DISCARDED, _HEADER = 1 << 31, 1 << 30, 8


@dataclass(frozen=True, slots=True)
class Event:
    """One of pages.News; `at_ns` is CLOCK_MONOTONIC. `path` is of a cgroup, from the hierarchy's root."""

    at_ns: int
    kind: pages.News
    tgid: int
    cgroup: int
    bytes: int
    device: int
    operation: int
    reason: int
    path: str = ""


class Events:
    """One reader of the ring; `fileno` is readable when there is something."""

    def __init__(self, fd: int) -> None:
        """Takes over `fd`, a ring buffer map."""
        self._fd = fd
        size = _max_entries(fd)
        self._mask = size - 1
        self._consumer = mmap.mmap(fd, _PAGE)
        self._ring = mmap.mmap(fd, _PAGE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE)
        self._at = ctypes.c_uint64.from_buffer(self._consumer)

    def fileno(self) -> int:
        """For a selector."""
        return self._fd

    def close(self) -> None:
        """What was not read waits for the next reader."""
        del self._at
        self._consumer.close()
        self._ring.close()
        os.close(self._fd)

    def read(self) -> Iterator[Event]:
        """Everything that is there, oldest first."""
        while self._at.value < _WORD.unpack_from(self._ring, 0)[0]:
            at = _PAGE + (self._at.value & self._mask)
            (length,) = _LENGTH.unpack_from(self._ring, at)
            if length & _BUSY:  # being written
                return
            size = length & ~_DISCARDED
            raw = self._ring[at + _HEADER : at + _HEADER + size]
            self._at.value += (size + _HEADER + 7) & ~7
            event = _event(raw)
            if event and not length & _DISCARDED:
                yield event


def _max_entries(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("max_entries:"))


def _event(raw: bytes) -> Event | None:
    if len(raw) < ctypes.sizeof(pages.Event):
        return None
    event = pages.Event.from_buffer_copy(raw)
    path = ""
    if len(raw) >= ctypes.sizeof(pages.CgroupEvent):
        path = os.fsdecode(pages.CgroupEvent.from_buffer_copy(raw).path)
    try:
        kind = pages.News(event.kind)
    except ValueError:
        return None
    return Event(
        event.at_ns, kind, event.tgid, event.cgroup, event.bytes, event.device, event.operation, event.reason, path
    )
