"""One process's pages, as the slicer reads and writes them: gates and budgets out, what it says of itself in.

Owns: the gate words on control pages, the sum of what the processes of a tenant say. Never: decides what stands there,
reads a word of a status page about a device but by `claims`. Cannot fail: pages are sealed against resizing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from fgpu_ebpf import claims, futex, pages
from fgpu_ebpf.clients import Client
from fgpu_ebpf.pages import ControlPage, StatusPage
from fgpu_ebpf.places import Seen

_Gates = ctypes.c_uint32 * pages.DEVICES
_Passes = ctypes.c_uint64 * pages.DEVICES
MOST_PASSES = 1_000
_OPEN = int(pages.Gate.OPEN)


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
        self.words = claims.Words.from_buffer(client.status.page)
        self.bell = ctypes.addressof(self.words) + StatusPage.bell.offset
        self.heard, self.place, self.rings = -1, -1, 0
        self.used: frozenset[int] = frozenset()
        self.rows: list[claims.Row] = []  # of them
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
        self.rows = [claims.row_of(device) for device in self.used]
        self._unused = [claims.row_of(device) for device in self._shared - self.used]

    def begins_to_use(self) -> bool:
        """One of its devices that it has not used before."""
        found = [row[0] for row in self._unused if claims.says_anything(self.words, row)]
        if found:
            self.use(found)
        return bool(found)

    def rested_ns(self, launches: int, in_flight: int, idle_ns: int) -> int | None:
        """Of the time since the last look: how much it had nothing in flight, on any of its devices; None: nothing."""
        is_idle = launches == self._launches and not in_flight
        rested, self._launches, self._idle = max(0, idle_ns - self._idle), launches, idle_ns
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


def seen_of(desks: Iterable[Desk], devices: frozenset[int], number: int, since_ns: int, now_ns: int) -> Seen:
    """What these processes say of all the devices together, of their turn of this number, which began at `since_ns`."""
    waiting, drained, begun = False, True, 0
    launches = flying = until = wanted = ended = 0
    rests = []
    for desk in desks:
        words, ahead_ns, launched, aloft, idle = desk.words, desk.client.ahead_ns, 0, 0, []
        for row in desk.rows:
            said = claims.read(words, row, ahead_ns, now_ns)
            waiting |= said.waiting
            launched += said.launches
            if said.in_flight:
                aloft += said.in_flight
                until = max(until, said.busy_until_ns)
                drained = drained and said.drained == number
            wanted = max(wanted, said.wanted_ns)
            idle.append(said.idle_ns)
            if said.begun_ns > since_ns and (said.begun_ns < begun or not begun):
                begun = said.begun_ns
            ended = max(ended, said.ended_ns)
        launches += launched
        flying += aloft
        rest = desk.rested_ns(launched, aloft, min(idle, default=0))
        if rest is not None:
            rests.append(rest)
    rested = rests[0] if len(rests) == 1 else 0  # nothing tells when several were idle together
    return Seen(devices, waiting, launches, flying, until, drained, wanted, begun, ended, rested)


def let_meet(desks: Iterable[Desk], now_ns: int) -> None:
    """Kernels of a gang that spin for others, which came to the gates too late: as many of those may go as do spin.

    Called where what is in flight should have ended long since. Programs that launch alike on all their devices are
    together again after one round; for all others there is the deadline.
    """
    found = [(desk, row[0], claims.read(desk.words, row, 0, now_ns)) for desk in desks for row in desk.rows]
    most = min(max((said.in_flight for *_, said in found), default=0), MOST_PASSES)
    for desk, device, said in found:
        if said.waiting and not said.in_flight:
            desk.let_pass(device, said.launches + most)
