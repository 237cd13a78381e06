"""One process's pages, as the slicer reads and writes them: gates and budgets out, what it says of itself in.

Owns: the gate words on control pages. Never: decides what stands there, believes what it reads. Cannot fail: pages are
sealed against resizing.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable

from fgpu_ebpf import futex, pages
from fgpu_ebpf.clients import Client
from fgpu_ebpf.pages import ControlPage, StatusPage
from fgpu_ebpf.places import Seen

_Words = ctypes.c_uint64 * (ctypes.sizeof(StatusPage) // 8)
_Gates = ctypes.c_uint32 * pages.DEVICES
_Passes = ctypes.c_uint64 * pages.DEVICES
_STATUS, _FLIGHT, _SPAN = struct.Struct("2IQ"), struct.Struct("4Q"), struct.Struct("2Q")  # fields as in pages
_SIZES = (("devices", _STATUS.size), ("flights", _FLIGHT.size), ("spans", _SPAN.size))
_Row = tuple[int, int, int, int]  # a device, and where on a status page its parts begin
MOST_PASSES = 1_000
_OPEN = int(pages.Gate.OPEN)
assert all(getattr(StatusPage, name).size == size * pages.DEVICES for name, size in _SIZES)


class Desk:
    """A process with a share. `bell`: where its word for us lies; `heard`, `rings`: of it; `used`: its devices.

    `place`: of its bell among those that are watched; -1: it is not.
    """

    __slots__ = (
        *("_gates", "_idle", "_launches", "_passes", "_shared", "_unused"),
        *("bell", "client", "heard", "place", "rings", "rows", "used", "words"),
    )

    def __init__(self, client: Client) -> None:
        assert client.status
        self.client = client
        self.words = _Words.from_buffer(client.status.page)
        self.bell = ctypes.addressof(self.words) + StatusPage.bell.offset
        self.heard, self.place, self.rings = -1, -1, 0
        self.used: frozenset[int] = frozenset()
        self.rows: list[_Row] = []  # of them
        self._launches = self._idle = 0
        self.turn_to(client)

    def turn_to(self, client: Client) -> None:
        """The client has another control page."""
        self._gates = _Gates.from_buffer(client.control.page, ControlPage.gates.offset)
        self._passes = _Passes.from_buffer(client.control.page, ControlPage.passes.offset)

    def rang(self) -> bool:
        """Something has changed since the last time."""
        value = self.words[0] >> 32
        if value == self.heard:
            return False
        self.heard = value
        self.rings += 1
        return True

    def may_use(self, devices: Iterable[int]) -> None:
        """It has a share of these."""
        self._shared = frozenset(devices)
        self.use(())

    def use(self, devices: Iterable[int]) -> None:
        """It has begun to use these, where it has a share of them."""
        self.used = self._shared.intersection((*self.used, *devices))
        self.rows = [_row(device) for device in self.used]
        self._unused = [_row(device) for device in self._shared - self.used]

    def begins_to_use(self) -> bool:
        """One of its devices that it has not used before."""
        found = []
        for device, at, _, _ in self._unused:
            threads, _, launches = _STATUS.unpack_from(self.words, at)
            if threads or launches:
                found.append(device)
        if found:
            self.use(found)
        return bool(found)

    def rested_ns(self, launches: int, in_flight: int, idle_ns: int) -> int | None:
        """Of the time since the last look: how much it had nothing in flight, on any of its devices; None: nothing."""
        is_idle = launches == self._launches and not in_flight
        rested, self._launches, self._idle = idle_ns - self._idle, launches, idle_ns
        return None if is_idle else rested

    def put(self, device: int, word: int) -> None:
        """Sets a gate; wakes those at it if it opens. What was let pass and has not is no allowance at the next."""
        if self._gates[device] != word:
            if word & _OPEN and self._passes[device]:
                self._passes[device] = 0
            self._gates[device] = word
            if word & _OPEN:
                futex.wake(ctypes.addressof(self._gates) + 4 * device)

    def open_all(self, but: Iterable[int] = ()) -> None:
        """Nobody schedules this process any more, but on these devices."""
        for device in set(range(pages.DEVICES)).difference(but):
            self.put(device, _OPEN)

    def let_pass(self, device: int, launches: int) -> None:
        """So many, since it began, may go through the closed gate."""
        self._passes[device] = launches
        futex.wake(ctypes.addressof(self._gates) + 4 * device)

    def set_budget(self, device: int, ns: int) -> None:
        """How much work may be in flight."""
        self.client.control.page.budget_ns[device] = ns


def _row(device: int) -> _Row:
    status, flight, span = (getattr(StatusPage, name).offset + size * device for name, size in _SIZES)
    return device, status, flight, span


def seen_of(desks: Iterable[Desk], devices: frozenset[int], number: int, since_ns: int) -> Seen:
    """What these processes say of all the devices together, of their turn of this number, which began then."""
    waiting, drained, begun = 0, True, 0
    launches = flying = until = wanted = ended = 0
    rests = []
    for desk in desks:
        words, ahead, launched, aloft, idle = desk.words, desk.client.ahead_ns, 0, 0, []
        for _, status_at, flight_at, span_at in desk.rows:
            threads, turn, count = _STATUS.unpack_from(words, status_at)
            in_flight, until_ns, wanted_ns, idle_ns = _FLIGHT.unpack_from(words, flight_at)
            begun_ns, ended_ns = _SPAN.unpack_from(words, span_at)
            if ahead:  # 0 is no time
                times = until_ns, wanted_ns, begun_ns, ended_ns
                until_ns, wanted_ns, begun_ns, ended_ns = (ns and ns - ahead for ns in times)
            waiting |= threads
            launched += count
            if in_flight:
                aloft += in_flight
                until = max(until, until_ns)
                drained = drained and turn == number
            wanted = max(wanted, wanted_ns)
            idle.append(idle_ns)
            if begun_ns > since_ns and (begun_ns < begun or not begun):
                begun = begun_ns
            ended = max(ended, ended_ns)
        launches += launched
        flying += aloft
        rest = desk.rested_ns(launched, aloft, min(idle, default=0))
        if rest is not None:
            rests.append(rest)
    rested = max(0, rests[0]) if len(rests) == 1 else 0  # nobody knows when several were idle together
    return Seen(devices, waiting > 0, launches, flying, until, drained, wanted, begun, ended, rested)


def let_meet(desks: Iterable[Desk]) -> None:
    """Kernels of a gang that spin for others, which came to the gates too late: as many of those may go as do spin.

    Called where what is in flight should have ended long since. Programs that launch alike on all their devices are
    together again after one round; whoever is not has a deadline.
    """
    found = []
    for desk in desks:
        for device, status_at, flight_at, _ in desk.rows:
            threads, _, launches = _STATUS.unpack_from(desk.words, status_at)
            in_flight = _FLIGHT.unpack_from(desk.words, flight_at)[0]
            found.append((desk, device, threads, launches, in_flight))
    most = min(max((in_flight for *_, in_flight in found), default=0), MOST_PASSES)
    for desk, device, threads, launches, in_flight in found:
        if threads and not in_flight:
            desk.let_pass(device, launches + most)
