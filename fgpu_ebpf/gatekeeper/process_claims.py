"""Claims of processes on their status pages, clamped. No other module reads the claims.

This module runs in the gatekeeper, in any thread that holds the time slicer's lock. No number is negative, and no time
lies in the future, except the end of work in flight, which is at most MOST_FLIGHT_NS away. `scheduling.claim_trust`
decides how far a claim is trusted. Reading cannot fail: a page has a fixed size and is sealed against resizing, and
every value of a word is valid.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.abi import StatusPage
from fgpu_ebpf.scheduling.claim_trust import MOST_FLIGHT_NS

Words = ctypes.c_uint64 * (ctypes.sizeof(StatusPage) // 8)
Row = tuple[int, int, int, int]  # a device, and the offsets of the device's three structures on a status page
_STATUS, _FLIGHT, _SPAN = struct.Struct("2IQ"), struct.Struct("4Q"), struct.Struct("2Q")  # fields as in abi.py
_SIZES = (("devices", _STATUS.size), ("flights", _FLIGHT.size), ("spans", _SPAN.size))
_MOST = 2**63 - 1
assert all(getattr(StatusPage, name).size == size * abi.DEVICES for name, size in _SIZES)


class Claim(NamedTuple):
    """Claims of a process about one device. Times are by the gatekeeper's CLOCK_MONOTONIC; 0: no such time."""

    waiting: bool
    drained: int  # number of the last turn whose gate was found closed with nothing in flight
    launches: int
    in_flight: int
    busy_until_ns: int
    wanted_ns: int
    idle_ns: int
    begun_ns: int
    ended_ns: int


def row_of(device: int) -> Row:
    """Return the device with the offsets of its structures on a status page."""
    status, flight, span = (getattr(StatusPage, name).offset + size * device for name, size in _SIZES)
    return device, status, flight, span


def read(words: ctypes.Array[ctypes.c_uint64], row: Row, ahead_ns: int, now_ns: int) -> Claim:
    """Return the claims about one device, clamped. Each word is read once.

    Args:
        words: the status page.
        row: the device, from row_of().
        ahead_ns: how far the clock of the process is ahead of the gatekeeper's clock.
        now_ns: the current time of the gatekeeper's CLOCK_MONOTONIC.
    """
    threads, drained, launches = _STATUS.unpack_from(words, row[1])
    in_flight, until_ns, wanted_ns, idle_ns = _FLIGHT.unpack_from(words, row[2])
    begun_ns, ended_ns = _SPAN.unpack_from(words, row[3])
    latest_ns = now_ns + MOST_FLIGHT_NS
    if ahead_ns:
        until_ns, wanted_ns, begun_ns, ended_ns = _by_this_clock((until_ns, wanted_ns, begun_ns, ended_ns), ahead_ns)
    return Claim(  # without min(): read() runs for every page, and calls of min() would cost more than all other code
        threads > 0,
        drained,
        launches if launches < _MOST else _MOST,
        in_flight if in_flight < _MOST else _MOST,
        until_ns if until_ns < latest_ns else latest_ns,
        wanted_ns if wanted_ns < now_ns else now_ns,
        idle_ns if idle_ns < _MOST else _MOST,
        begun_ns if begun_ns < now_ns else now_ns,
        ended_ns if ended_ns < now_ns else now_ns,
    )


def _by_this_clock(times: Sequence[int], ahead_ns: int) -> list[int]:
    return [ns and max(0, ns - ahead_ns) for ns in times]


def busy_until_ns(words: ctypes.Array[ctypes.c_uint64], row: Row, ahead_ns: int) -> int:
    """Return the expected end of the work in flight on a device, by an unlimited claim; 0: no claimed work."""
    in_flight, until_ns, _, _ = _FLIGHT.unpack_from(words, row[2])
    return max(0, until_ns - ahead_ns) if in_flight else 0


def is_used(words: ctypes.Array[ctypes.c_uint64], row: Row) -> bool:
    """Return True if a thread waits at the gate of this device, or has launched on the device."""
    threads, _, launches = _STATUS.unpack_from(words, row[1])
    return bool(threads or launches)
