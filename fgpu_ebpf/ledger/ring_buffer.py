"""A reader of BPF ring buffers with the kernel's rare events.

The agent's main thread reads the ring buffer `events`, and the gatekeeper's main thread reads `bell`. Reading never
waits. The kernel counts the events that did not fit into `events`. A record of another layout is skipped.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.linux import bpf, cgroup_namespace

_PAGE = mmap.PAGESIZE
_WORD = struct.Struct("Q")
_LENGTH = struct.Struct("I")
_BUSY, _DISCARDED, _HEADER = 1 << 31, 1 << 30, 8


class Event(NamedTuple):
    """A rare event of the kernel. `at_ns` is CLOCK_MONOTONIC.

    `path` is the path of a cgroup in this cgroup namespace, or empty.
    """

    at_ns: int
    kind: abi.News
    tgid: int
    cgroup: int
    bytes: int
    device: int
    operation: int
    reason: int
    path: str = ""


class Events:
    """A reader of one ring buffer. The descriptor is readable when an event is available."""

    def __init__(self, fd: int) -> None:
        """Take ownership of `fd`, the descriptor of a ring buffer map. Raise OSError for any other map."""
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            self._fd = fd
            size = bpf.form(fd).max_entries
            self._mask = size - 1
            self._consumer = mmap.mmap(fd, _PAGE)
            self._ring = mmap.mmap(fd, _PAGE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE)
            self._at = ctypes.c_uint64.from_buffer(self._consumer)
            undo.pop_all()

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._fd

    def close(self) -> None:
        """Close the map. Events that were not read are kept for the next reader."""
        del self._at
        self._consumer.close()
        self._ring.close()
        os.close(self._fd)

    def read(self) -> Iterator[Event]:
        """Yield all available events, oldest first, except events of cgroups outside this cgroup namespace."""
        while self._at.value < _WORD.unpack_from(self._ring, 0)[0]:
            at = _PAGE + (self._at.value & self._mask)
            (length,) = _LENGTH.unpack_from(self._ring, at)
            if length & _BUSY:  # the kernel still writes this record
                return
            size = length & ~_DISCARDED
            raw = self._ring[at + _HEADER : at + _HEADER + size]
            self._at.value += (size + _HEADER + 7) & ~7
            event = _event(raw)
            if event and not length & _DISCARDED:
                yield event


def _event(raw: bytes) -> Event | None:
    if len(raw) < ctypes.sizeof(abi.Event):
        return None
    event = abi.Event.from_buffer_copy(raw)
    path = ""
    if len(raw) >= ctypes.sizeof(abi.CgroupEvent):
        found = cgroup_namespace.inside(os.fsdecode(abi.CgroupEvent.from_buffer_copy(raw).path))
        if found is None:
            return None
        path = found
    try:
        kind = abi.News(event.kind)
    except ValueError:
        return None
    return Event(
        event.at_ns, kind, event.tgid, event.cgroup, event.bytes, event.device, event.operation, event.reason, path
    )
