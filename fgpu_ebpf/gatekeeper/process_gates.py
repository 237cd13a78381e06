"""The pages of processes with a share: the time slicer writes gates and budgets, and reads claims.

This module runs in the gatekeeper, in any thread that holds the time slicer's lock. The module also combines the claims
of a tenant's processes. `scheduling.turns` decides which gates are open. Pages are sealed against resizing, so the
functions raise no errors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from fgpu_ebpf import abi
from fgpu_ebpf.abi import ControlPage, StatusPage
from fgpu_ebpf.gatekeeper import process_claims
from fgpu_ebpf.gatekeeper.sessions import Session
from fgpu_ebpf.linux import futex
from fgpu_ebpf.scheduling.reports import Seen

_Gates = ctypes.c_uint32 * abi.DEVICES
_Passes = ctypes.c_uint64 * abi.DEVICES
MOST_PASSES = 1_000
_OPEN = int(abi.Gate.OPEN)


class ProcessGates:
    """The pages of a process with a share.

    `address`: the address of the word that the process changes to wake the time slicer. `last_value`: the last value
    that was read from the word. `wakeups`: how often the word has changed since the time slicer last reset this count.
    `place`: the slot of the word among the watched words; -1: the word is not watched. `used`: the devices that the
    process uses.
    """

    __slots__ = (
        *("_gates", "_idle", "_launches", "_passes", "_shared", "_unused"),
        *("address", "last_value", "place", "rows", "session", "used", "wakeups", "words"),
    )

    def __init__(self, session: Session) -> None:
        assert session.status
        self.session = session
        self.words = process_claims.Words.from_buffer(session.status.page)
        self.address = ctypes.addressof(self.words) + StatusPage.bell.offset
        self.last_value, self.place, self.wakeups = -1, -1, 0
        self.used: frozenset[int] = frozenset()
        self.rows: list[process_claims.Row] = []  # rows of the devices in `used`
        self._launches = self._idle = 0
        self.use_pages_of(session)

    def use_pages_of(self, session: Session) -> None:
        """Use the session's new control page."""
        self._gates = _Gates.from_buffer(session.control.page, ControlPage.gates.offset)
        self._passes = _Passes.from_buffer(session.control.page, ControlPage.passes.offset)

    def has_changed(self) -> bool:
        """Return True if the process has changed its word since the last call."""
        value = self.words[0] >> 32
        if value == self.last_value:
            return False
        self.last_value = value
        self.wakeups += 1
        return True

    def set_shared(self, devices: Iterable[int]) -> None:
        """Set the devices on which the process has a share of time."""
        self._shared = frozenset(devices)
        self.use(())

    def use(self, devices: Iterable[int]) -> None:
        """Record that the process has begun to use devices. Devices without a share are ignored."""
        self.used = self._shared.intersection((*self.used, *devices))
        self.rows = [process_claims.row_of(device) for device in self.used]
        self._unused = [process_claims.row_of(device) for device in self._shared - self.used]

    def has_begun_to_use(self) -> bool:
        """Return True if the process has begun to use a new device."""
        found = [row[0] for row in self._unused if process_claims.is_used(self.words, row)]
        if found:
            self.use(found)
        return bool(found)

    def busy_until_ns(self) -> int:
        """Return the expected end of the work in flight, by the unlimited claims of the process; 0: no claimed work."""
        ahead_ns = self.session.ahead_ns
        return max((process_claims.busy_until_ns(self.words, row, ahead_ns) for row in self.rows), default=0)

    def rested_ns(self, launches: int, in_flight: int, idle_ns: int) -> int | None:
        """Return how many nanoseconds the process was idle since the last call; None: the whole time.

        Args:
            launches: the total number of launches on all devices.
            in_flight: the number of launches in flight on all devices.
            idle_ns: the total idle time on the device that was idle for the shortest time.
        """
        is_idle = launches == self._launches and not in_flight
        rested, self._launches, self._idle = max(0, idle_ns - self._idle), launches, idle_ns
        return None if is_idle else rested

    def put(self, device: int, word: int) -> None:
        """Set a gate. If the gate opens, clear an unused allowance of let_pass(), and wake the threads that wait."""
        if self._gates[device] != word:
            if word & _OPEN and self._passes[device]:
                self._passes[device] = 0
            self._gates[device] = word
            if word & _OPEN:
                futex.wake(ctypes.addressof(self._gates) + 4 * device)

    def open_all(self, but: Iterable[int] = ()) -> None:
        """Open the gates of all devices except `but`, the devices on which the process has a share of time."""
        for device in set(range(abi.DEVICES)).difference(but):
            self.put(device, _OPEN)

    def let_pass(self, device: int, launches: int) -> None:
        """Let launches through the closed gate until the process has made `launches` launches since its start."""
        self._passes[device] = launches
        futex.wake(ctypes.addressof(self._gates) + 4 * device)

    def set_budget(self, device: int, ns: int) -> None:
        """Set how many nanoseconds of work may be in flight on a device."""
        self.session.control.page.budget_ns[device] = ns


def observe_processes(
    all_gates: Iterable[ProcessGates], devices: frozenset[int], number: int, since_ns: int, now_ns: int
) -> Seen:
    """Combine the claims of a tenant's processes about all devices.

    Args:
        all_gates: the processes.
        devices: the devices that these processes use.
        number: the number of the tenant's turn.
        since_ns: when this turn began.
        now_ns: the current time of CLOCK_MONOTONIC.
    """
    waiting, drained, begun = False, True, 0
    launches = flying = until = wanted = ended = 0
    rests = []
    for gates in all_gates:
        words, ahead_ns, launched, aloft, idle_ns = gates.words, gates.session.ahead_ns, 0, 0, -1
        for row in gates.rows:
            waits, last, count, in_flight, until_ns, wanted_ns, rest_ns, begun_ns, ended_ns = process_claims.read(
                words, row, ahead_ns, now_ns
            )
            waiting |= waits
            launched += count
            if in_flight:
                aloft += in_flight
                drained = drained and last == number
                if until_ns > until:
                    until = until_ns
            if wanted_ns > wanted:
                wanted = wanted_ns
            if rest_ns < idle_ns or idle_ns < 0:
                idle_ns = rest_ns
            if begun_ns > since_ns and (begun_ns < begun or not begun):
                begun = begun_ns
            if ended_ns > ended:
                ended = ended_ns
        launches += launched
        flying += aloft
        rest = gates.rested_ns(launched, aloft, max(0, idle_ns))
        if rest is not None:
            rests.append(rest)
    rested = rests[0] if len(rests) == 1 else 0  # the common idle time of several processes is unknown
    return Seen(devices, waiting, launches, flying, until, drained, wanted, begun, ended, rested)


def let_gang_through(all_gates: Iterable[ProcessGates], now_ns: int) -> None:
    """Let late kernels through closed gates if other kernels of the same gang spin and wait on other devices.

    A gang is a set of kernels, one on each device, that wait for each other. This function is called when the work in
    flight is overdue (`scheduling.state.LATE_NS`). At each gate with waiting threads and nothing in flight, the
    function admits as many launches as are in flight on the busiest device, and at most MOST_PASSES. This number
    suffices for a program that launches the same kernels on all its devices. The turn of any other program ends at the
    deadline of its drain.
    """
    claims = [
        (gates, row[0], process_claims.read(gates.words, row, 0, now_ns)) for gates in all_gates for row in gates.rows
    ]
    most = min(max((claim.in_flight for *_, claim in claims), default=0), MOST_PASSES)
    for gates, device, claim in claims:
        if claim.waiting and not claim.in_flight:
            gates.let_pass(device, claim.launches + most)
