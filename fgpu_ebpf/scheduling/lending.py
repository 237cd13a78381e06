"""Lending: all tenants of a device may launch at the same time, as long as each tenant gains or loses nothing.

Turns are exclusive, so turns waste a device if its tenants leave the device idle in their own turns. The driver can run
such tenants at the same time, but for other pairs of programs its switches between contexts cost more than the idle
time. No rule predicts the better case, so the launches are measured. All gates of the device are opened for a trial,
and the launches of each tenant in a second are compared with the launches under turns just before. Lending continues
only while no tenant launches less than under turns, and all tenants together launch more. There is no trial unless NVML
reports that the device is idle for half of the time.

A tenant that reports false launches can end the lending, which returns all tenants to turns. Such a tenant cannot
prolong a lending by which a neighbour loses, because the neighbour's own launches end the lending.

Tenants with a ceiling, tenants of different priorities, and tenants with contexts on several devices always take turns.
The module runs in threads of the gatekeeper that hold the time slicer's lock, does no I/O and reads no clock. Times are
CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from fgpu_ebpf.scheduling import concurrent
from fgpu_ebpf.scheduling.state import NEVER_NS, Place
from fgpu_ebpf.scheduling.virtual_clock import Clocks

MS, SECOND = 1_000_000, 1_000_000_000
TURNS_NS, MOST_TURNS_NS = 500 * MS, 4 * SECOND  # the time for which launches under turns are counted, and its maximum
LENT_NS, MOST_LENT_NS = 250 * MS, 2 * SECOND  # the time of counting while lent, and its maximum
CHECK_NS = 50 * MS  # the period of checks while the device is lent
ENOUGH, SOME = 32, 16  # launches under turns in that time for an exact comparison, and for a rough comparison
KEEPS, ROUGHLY = 0.95, 0.75  # a tenant must have this part of its launches under turns
GAINS = 1.1  # the minimum of the mean of these parts
GROWS = 1.5  # a tenant that launches this many times as often as in earlier windows does other work now
WINDOWS = 8  # the mean of about this many windows is compared, because programs first catch up with their schedules
MOST_USE = 0.5  # if kernels run for a larger part of the time according to NVML, lending gains too little
REFRESH_NS = 20 * SECOND  # after this time the launches under turns are counted again
FIRST_PAUSE_NS, MOST_PAUSE_NS = SECOND, 64 * SECOND  # bounds of the time between a failed trial and the next


@dataclass(slots=True)
class _Count:
    """The counters of one tenant at the beginning of a window. `rate`, `usual`: launches in a nanosecond under turns,
    and in the windows in which the device was lent.
    """

    place: Place
    launches: int = 0
    rate: float = 0.0
    usual: float = 0.0

    def begin(self) -> None:
        """Begin a window, the time in which launches are counted."""
        self.launches = self.place.seen.launches

    def launched(self) -> int:
        """Return the launches since the window began."""
        return self.place.seen.launches - self.launches


@dataclass(slots=True)
class _Device:
    """A device that may be lent to all its tenants. `lent_ns`: the time since which the device is lent, or 0."""

    number: int
    counts: list[_Count] = field(default_factory=list)
    since_ns: int = 0
    lent_ns: int = 0
    counted_ns: int = 0  # until when lent time has been counted
    pause_ns: int = FIRST_PAUSE_NS
    paused_ns: int = 0

    def begin(self, now_ns: int) -> None:
        """Begin a window, the time in which launches are counted."""
        self.since_ns = now_ns
        for count in self.counts:
            count.begin()

    def may_be_lent(self, now_ns: int) -> bool:
        """Check the launches under turns. Return whether a trial can be made now."""
        passed_ns = now_ns - self.since_ns
        if now_ns < self.paused_ns and passed_ns >= MOST_TURNS_NS:  # launches just before the trial are compared
            self.begin(now_ns)
        if passed_ns < TURNS_NS or now_ns < self.paused_ns:
            return False
        active = [count for count in self.counts if count.launched() > 0]
        if min((count.launched() for count in active), default=0) < ENOUGH and passed_ns < MOST_TURNS_NS:
            return False
        observed = [count.place.observed[self.number] for count in active]
        if any(each.from_ns < self.since_ns for each in observed):  # NVML's report covers earlier work
            return False
        uses = [each.use for each in observed]
        may = len(active) > 1 and None not in uses and sum(filter(None, uses)) <= MOST_USE
        may = may and all(count.launched() >= ENOUGH for count in active)
        for count in self.counts if may else ():
            count.rate, count.usual = count.launched() / passed_ns, 0.0
        self.begin(now_ns)
        return may

    def is_worth_it(self, now_ns: int) -> bool:
        """Check the launches while the device is lent. Return whether the device stays lent.

        If the result is False, `paused_ns` has the time of the next trial.
        """
        passed_ns = now_ns - self.since_ns
        parts = [count.launched() / (count.rate * passed_ns) for count in self.counts if count.rate]
        least = min((count.rate * passed_ns for count in self.counts if count.rate), default=0)
        if any(count.launched() for count in self.counts if not count.rate):  # the tenant was idle, so no rate is known
            return False
        is_early = least < SOME or (min(parts) >= ROUGHLY and (passed_ns < LENT_NS or least < ENOUGH))
        if is_early and passed_ns < MOST_LENT_NS:
            return True
        if min(parts) < KEEPS or sum(parts) < GAINS * len(parts):
            self.paused_ns = now_ns + self.pause_ns
            self.pause_ns = min(2 * self.pause_ns, MOST_PAUSE_NS)
            return False
        self.pause_ns = FIRST_PAUSE_NS
        for count in self.counts:
            rate = count.launched() / passed_ns
            if rate > GROWS * (count.usual or self._most(count)):
                return False
            count.usual += (rate - count.usual) / WINDOWS if count.usual else rate
        self.begin(now_ns)
        return now_ns - self.lent_ns < REFRESH_NS

    def _most(self, count: _Count) -> float:
        """Return the launches in a nanosecond that a tenant can make beside other tenants, if its work has not changed.

        Under turns, the tenant had at least its part of the time whenever it had work.
        """
        if not count.rate or any(each.place.above for each in self.counts):
            return math.inf
        weights = sum(each.place.share.weight for each in self.counts if each.rate)
        return count.rate * weights / count.place.share.weight


class Lending:
    """The devices that several tenants use, except concurrent devices, whose tenants run at the same time."""

    def __init__(self, clocks: Clocks) -> None:
        self._devices: dict[int, _Device] = {}
        self.concurrent = concurrent.Concurrent(clocks)
        self._clocks = clocks

    def restart(self, places: Iterable[Place], now_ns: int) -> list[Place]:
        """Count from now on, for these tenants. Return the tenants to which a device was lent until now."""
        before = [place for device in self._devices.values() for place in _lent(device)]
        here: dict[int, list[Place]] = {}
        for place in places:
            for number in place.seen.devices:
                here.setdefault(number, []).append(place)
        for device in self._devices.values():
            device.counts, device.lent_ns = [], 0
        before += self.concurrent.restart(here, now_ns)
        for number, its in here.items():
            if len(its) > 1 and len({place.share.rank for place in its}) == 1 and all(map(_may, its)):
                device = self._devices.setdefault(number, _Device(number))
                device.counts = [_Count(place) for place in its]
                device.begin(now_ns)
        return before

    def look(self, now_ns: int) -> tuple[list[Place], list[Place], list[Place]]:
        """Return three lists of tenants.

        The first list has tenants to which a device is lent from now on. The second list has tenants to which a device
        is no longer lent. The third list has other tenants that are to be held or released.
        """
        begin, end, change = self.concurrent.look(now_ns)
        for number, device in self._devices.items():
            if not device.counts:
                continue
            if not device.lent_ns:
                if device.may_be_lent(now_ns):
                    device.lent_ns = device.counted_ns = now_ns
                    begin += _lent(device)
                continue
            self._clocks.count(number).lent_ns += now_ns - device.counted_ns
            device.counted_ns = now_ns
            if not device.is_worth_it(now_ns):
                end += _lent(device)
                device.lent_ns = 0
                device.begin(now_ns)
        return begin, end, change

    def tenants(self) -> list[int]:
        """Return the tenants that may launch at the same time as other tenants. Checks need their observations."""
        lent = [place for device in self._devices.values() for place in _lent(device)]
        return [place.tenant for place in (*lent, *self.concurrent.to_see())]

    def due_ns(self, now_ns: int) -> int:
        """Return when the next check is due; NEVER_NS: no device is lent, and tenants' turns cause checks."""
        lent = any(device.lent_ns for device in self._devices.values())
        return min(now_ns + CHECK_NS if lent else NEVER_NS, self.concurrent.due_ns())


def switch(
    begin: list[Place], end: list[Place], change: list[Place], number: Callable[[], int], now_ns: int
) -> set[int]:
    """Open gates of tenants in `begin`, close gates of tenants in `end`, hold or release tenants in `change`.

    The launches of a tenant on a lent device are counted as in a turn, and its work in flight has the same bound. A
    tenant in `end` requests a turn when it next launches, and the work in flight is charged until the drain has ended.

    Returns:
        The tenants with changed gates.
    """
    changed = set()
    for place in begin:
        place.lent, place.held, place.free_on = True, False, place.seen.devices
        place.late_ns = 0  # its work in flight is not charged as late work while other tenants may launch too
    for place in end:
        place.lent, place.held, place.free_on = False, False, frozenset()
        place.late_ns = now_ns if place.seen.in_flight else 0
    for place in change:
        place.held = not place.held
    for place in (*begin, *end, *change):
        place.number = number()
        changed.add(place.tenant)
    return changed


def set_free(places: Collection[Place]) -> Iterator[tuple[Place, frozenset[int]]]:
    """Make free exactly the tenants that have no ceiling and share no device.

    Yield each tenant with a changed `free_on`, and the earlier value.
    """
    users = Counter(device for place in places for device in place.seen.devices)
    for place in places:
        if place.lent:
            continue
        before, alone = place.free_on, all(users[device] == 1 for device in place.seen.devices)
        place.free_on = place.seen.devices if alone and not place.share.limited else frozenset()
        if place.free_on != before:
            yield place, before


def _may(place: Place) -> bool:
    return len(place.seen.devices) == 1 and not place.share.limited


def _lent(device: _Device) -> list[Place]:
    return [count.place for count in device.counts] if device.lent_ns else []
