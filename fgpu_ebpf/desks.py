"""One process's pages, as the slicer reads and writes them: gates and budgets out, what it says of itself in.

Owns: the gate words on control pages. Never: decides what stands there, believes what it reads. Cannot fail: pages are
sealed against resizing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from fgpu_ebpf import futex, pages
from fgpu_ebpf.clients import Client
from fgpu_ebpf.pages import ControlPage, StatusPage
from fgpu_ebpf.places import Seen

_Words = ctypes.c_uint64 * (ctypes.sizeof(StatusPage) // 8)
_Gates = ctypes.c_uint32 * pages.DEVICES
_DEVICES, _FLIGHTS, _SPANS = (getattr(StatusPage, name).offset // 8 for name in ("devices", "flights", "spans"))
_LOW = 0xFFFFFFFF
MOST_PASSES = 1_000
_OPEN = int(pages.Gate.OPEN)


class Desk:
    """A process with a share. `bell`: where its word for us lies; `heard`, `rings`: of it; `used`: its devices.

    `place`: of its bell among those that are watched; -1: it is not.
    """

    __slots__ = ("_gates", "_idle", "_launches", "bell", "client", "heard", "place", "rings", "used", "words")

    def __init__(self, client: Client) -> None:
        assert client.status
        self.client = client
        self.words = _Words.from_buffer(client.status.page)
        self.bell = ctypes.addressof(self.words) + StatusPage.bell.offset
        self.heard, self.place, self.rings = -1, -1, 0
        self.used: set[int] = set()
        self._launches = self._idle = 0
        self.turn_to(client)

    def turn_to(self, client: Client) -> None:
        """The client has another control page."""
        self._gates = _Gates.from_buffer(client.control.page, ControlPage.gates.offset)

    def rang(self) -> bool:
        """Something has changed since the last time."""
        value = self.words[0] >> 32
        if value == self.heard:
            return False
        self.heard = value
        self.rings += 1
        return True

    def begins_to_use(self, devices: Iterable[int]) -> bool:
        """One of these that it has not used before."""
        words, before = self.words, len(self.used)
        for device in devices:
            at = _DEVICES + 2 * device
            if words[at] & _LOW or words[at + 1]:
                self.used.add(device)
        return len(self.used) > before

    def rested_ns(self) -> int | None:
        """Of the time since the last look: how much it had nothing in flight, on any of its devices; None: nothing."""
        words, places = self.words, [_FLIGHTS + 4 * device for device in self.used]
        idle = min((words[place + 3] for place in places), default=0)
        launches = sum(words[_DEVICES + 2 * device + 1] for device in self.used)
        is_idle = launches == self._launches and not any(words[place] for place in places)
        rested, self._launches, self._idle = idle - self._idle, launches, idle
        return None if is_idle else rested

    def put(self, device: int, word: int) -> None:
        """Sets a gate; wakes those at it if it opens."""
        if self._gates[device] != word:
            self._gates[device] = word
            if word & _OPEN:
                futex.wake(ctypes.addressof(self._gates) + 4 * device)

    def open_all(self, but: Iterable[int] = ()) -> None:
        """Nobody schedules this process any more, but on these devices."""
        for device in set(range(pages.DEVICES)).difference(but):
            self.put(device, _OPEN)

    def let_pass(self, device: int, launches: int) -> None:
        """So many more may go through the closed gate."""
        words = self.words
        self.client.control.page.passes[device] = words[_DEVICES + 2 * device + 1] + launches
        futex.wake(ctypes.addressof(self._gates) + 4 * device)

    def set_budget(self, device: int, ns: int) -> None:
        """How much work may be in flight."""
        self.client.control.page.budget_ns[device] = ns


def seen_of(desks: Iterable[Desk], devices: frozenset[int], number: int, since_ns: int) -> Seen:
    """What these processes say of all the devices together, of their turn of this number, which began then."""
    waiting, drained, begun = False, True, 0
    launches = flying = until = wanted = ended = 0
    rests = []
    for desk in desks:
        words = desk.words
        rests.append(desk.rested_ns())
        for device in desk.used:
            at = _DEVICES + 2 * device
            first, place = words[at], _FLIGHTS + 4 * device
            waiting = waiting or first & _LOW != 0
            launches += words[at + 1]
            if words[place]:
                flying += words[place]
                until = max(until, words[place + 1])
                drained = drained and first >> 32 == number
            wanted = max(wanted, words[place + 2])
            came = words[_SPANS + 2 * device]
            if came > since_ns and (came < begun or not begun):
                begun = came
            ended = max(ended, words[_SPANS + 2 * device + 1])
    busy = [rest for rest in rests if rest is not None]
    idle = max(0, busy[0]) if len(busy) == 1 else 0  # nobody knows when several were idle together
    return Seen(devices, waiting, launches, flying, until, drained, wanted, begun, ended, idle)


def let_meet(desks: Iterable[Desk]) -> None:
    """Kernels of a gang that spin for others, which came to the gates too late: as many of those may go as do spin.

    Called where what is in flight should have ended long since. Programs that launch alike on all their devices are
    together again after one round; whoever is not has a deadline.
    """
    places = [(desk, device, desk.words[_FLIGHTS + 4 * device]) for desk in desks for device in desk.used]
    most = max((flying for _, _, flying in places), default=0)
    for desk, device, flying in places:
        if not flying and desk.words[_DEVICES + 2 * device] & _LOW:
            desk.let_pass(device, min(most, MOST_PASSES))
