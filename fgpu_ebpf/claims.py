"""What processes say of themselves on their status pages, clamped: this module is the one place that reads those words.

Owns: the meaning of the words, and their bounds. No number is negative, no time lies in the future, but the end of work
in flight, which is at most MOST_FLIGHT_NS away. Never: believes more than that; `turns` decides what a claim is worth.
Cannot fail: a page has a fixed size and is sealed against resizing, and every word of it has a meaning.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

from fgpu_ebpf import pages
from fgpu_ebpf.pages import StatusPage
from fgpu_ebpf.trust import MOST_FLIGHT_NS

Words = ctypes.c_uint64 * (ctypes.sizeof(StatusPage) // 8)
Row = tuple[int, int, int, int]  # a device, and where on a status page its parts begin
_STATUS, _FLIGHT, _SPAN = struct.Struct("2IQ"), struct.Struct("4Q"), struct.Struct("2Q")  # fields as in pages
_SIZES = (("devices", _STATUS.size), ("flights", _FLIGHT.size), ("spans", _SPAN.size))
_MOST = 2**63 - 1
assert all(getattr(StatusPage, name).size == size * pages.DEVICES for name, size in _SIZES)


class Claim(NamedTuple):
    """What a process says of one device; times are by the clock of this process, 0: no such time."""

    waiting: bool
    drained: int  # number of a turn
    launches: int
    in_flight: int
    busy_until_ns: int
    wanted_ns: int
    idle_ns: int
    begun_ns: int
    ended_ns: int


def row_of(device: int) -> Row:
    """Where on a status page the words about a device are."""
    status, flight, span = (getattr(StatusPage, name).offset + size * device for name, size in _SIZES)
    return device, status, flight, span


def read(words: ctypes.Array[ctypes.c_uint64], row: Row, ahead_ns: int, now_ns: int) -> Claim:
    """Reads each word once. `ahead_ns`: how far the clock of the process is ahead of this one."""
    threads, drained, launches = _STATUS.unpack_from(words, row[1])
    in_flight, until_ns, wanted_ns, idle_ns = _FLIGHT.unpack_from(words, row[2])
    begun_ns, ended_ns = _SPAN.unpack_from(words, row[3])
    latest_ns = now_ns + MOST_FLIGHT_NS
    if ahead_ns:
        until_ns, wanted_ns, begun_ns, ended_ns = _by_this_clock((until_ns, wanted_ns, begun_ns, ended_ns), ahead_ns)
    return Claim(
        threads > 0, drained, min(launches, _MOST), min(in_flight, _MOST),
        min(until_ns, latest_ns), min(wanted_ns, now_ns), min(idle_ns, _MOST),
        min(begun_ns, now_ns), min(ended_ns, now_ns),
    )  # fmt: skip


def _by_this_clock(times: Sequence[int], ahead_ns: int) -> list[int]:
    return [ns and max(0, ns - ahead_ns) for ns in times]


def says_anything(words: ctypes.Array[ctypes.c_uint64], row: Row) -> bool:
    """A thread waits at the gate of this device, or has launched there."""
    threads, _, launches = _STATUS.unpack_from(words, row[1])
    return bool(threads or launches)
