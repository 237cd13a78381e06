"""Concurrent devices: all tenants launch at the same time, and a tenant that is ahead of its share waits.

The tenants of a device take turns first, which measures what a launch costs when its tenant has the device alone. Then
all gates open. The *progress* of a tenant is the number of its launches times this cost, and at most the time that
passes. A tenant is charged its progress, not the time for which its gate is open. So two tenants can together progress
by more than a second in a second.

A tenant is *slowed* if the time for which it had work in flight exceeds its progress. *Virtual time* is progress
divided by the weight. A tenant is held if it is ahead of a slowed tenant by more than LAG_NS of virtual time. A tenant
that is behind and not slowed does not need its share: its virtual time is moved up. A tenant is also held at its
ceiling, and while a tenant of higher priority is slowed. If all tenants together progress no faster than under turns,
they take turns again, and the next trial follows after a pause.

A tenant that reports false launches changes its own progress. The tenant can gain a part of the time for which others
are held. This gain is bounded: while others are held for a tenant, the time that passes is charged to that tenant.

The module runs in threads of the gatekeeper that hold the time slicer's lock, does no I/O and reads no clock. Times are
CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from fgpu_ebpf.scheduling.fair_queue import PLAIN_WEIGHT
from fgpu_ebpf.scheduling.reports import NOTHING, Seen
from fgpu_ebpf.scheduling.state import NEVER_NS, Place
from fgpu_ebpf.scheduling.virtual_clock import Clocks

MS, SECOND = 1_000_000, 1_000_000_000
LEARN_NS, LEARN_LAUNCHES = 150 * MS, 32  # busy time and launches that measure the cost of a launch
AGAIN_NS = 80 * MS  # the same, if a cost was measured before
MOST_LEARN_NS, MOST_AGAIN_NS = 2 * SECOND, 400 * MS  # bounds of such a phase: an idle tenant may launch nothing
FIRST_NS = 5 * SECOND  # costs that were measured for the first time, perhaps while programs started, hold for this time
REFRESH_NS, LATEST_NS = 20 * SECOND, 300 * SECOND  # costs are measured again: after holding, and if no tenant was held
LOOK_NS, MOST_LOOK_NS = 4 * MS, 12 * MS  # bounds of the time between looks: less if a tenant may soon be held
IDLE_LOOK_NS = 24 * MS  # the period in which idle tenants are looked at
LAG_NS, NEAR_NS = 10 * MS, 6 * MS  # a tenant that is ahead by LAG_NS waits until it is ahead by less than NEAR_NS
IDLE_NS = 50 * MS  # a tenant that had no work for this time has no share to catch up with
WINDOW_NS = 100 * MS  # the time over which it is measured whether a tenant is slowed
ALONE_WINDOW_NS, ALONE_NS = SECOND, 20 * MS  # the same, while all others are held, and how much of it is enough
SLOWED = 1.05  # a tenant is slowed if its launches take this many times their cost alone
CARRY_NS = 20 * MS  # progress that is reported in one moment may have taken this time
CHECK_NS = 500 * MS  # the period of the comparison with turns
MOST_CLAIM = 1.1  # a cost is wrong if launches cost this many times the time that passes
LEAST_GAIN = 0.97  # tenants take turns again if all progress together falls below this part of that under turns
FIRST_PAUSE_NS, MOST_PAUSE_NS = SECOND, 64 * SECOND


@dataclass(eq=False, slots=True)
class _Runner:
    """A tenant on a concurrent device.

    `busy_ns`, `done_ns`: its time and its progress, lately. `alone_busy_ns`, `alone_done_ns`: the same while all others
    were held.
    """

    place: Place
    seen: Seen = NOTHING  # the last observation that was counted
    launches: int = 0
    active_ns: int = 0  # when it last had work
    wanted_ns: int = 0  # when it last requested a launch
    carried_ns: float = 0.0  # reported progress that was not charged yet
    resting_ns: int = 0  # the time without work since the last work
    busy_ns: float = 0.0
    done_ns: float = 0.0
    alone_busy_ns: float = 0.0
    alone_done_ns: float = 0.0
    claimed_ns: float = 0.0  # reported progress since the last check
    has_launched: bool = False  # since the phase began

    def begin(self) -> None:
        """Begin a phase of turns or of concurrent launches: count the tenant's launches and times from now on."""
        self.seen, self.launches, self.has_launched = self.place.seen, self.place.seen.launches, False
        self.carried_ns = self.busy_ns = self.done_ns = self.claimed_ns = 0.0
        self.alone_busy_ns = self.alone_done_ns = 0.0

    def launched(self) -> int:
        """Return the launches since the last call."""
        launches, self.launches = max(0, self.place.seen.launches - self.launches), self.place.seen.launches
        self.has_launched |= launches > 0
        return launches

    def rested_ns(self) -> int:
        """Return the time without work that the tenant has reported since the last call.

        A rest that ends at a closed gate is not among the rests that processes add up.
        """
        seen, wanted_ns = self.place.seen, self.wanted_ns
        self.wanted_ns = seen.wanted_ns
        is_new = seen.waiting and not seen.in_flight and seen.wanted_ns > max(wanted_ns, seen.ended_ns) > 0
        return seen.idle_ns + (seen.wanted_ns - seen.ended_ns if is_new and seen.ended_ns else 0)

    def is_active(self, now_ns: int) -> bool:
        """Return whether the tenant has work, or had some a short time ago."""
        return now_ns - self.active_ns < IDLE_NS

    def is_slowed(self) -> bool:
        """Return whether the tenant progresses less than if it had the device alone.

        A tenant that is as slow while all others are held does not wait for the device, but for its own host code.
        """
        pace = max(1.0, self.alone_busy_ns / self.alone_done_ns) if self.alone_done_ns > ALONE_NS else 1.0
        return self.place.held or self.busy_ns > SLOWED * pace * self.done_ns

    @property
    def has_work(self) -> bool:
        """True if the tenant had work at the last observation: without work, nothing can slow it down."""
        return not self.resting_ns

    def most_carried_ns(self) -> float:
        """Return how long the work that was reported in one moment may take: at least one launch."""
        return max(CARRY_NS, min(SECOND, self.place.alone.of(1)))

    def is_stopped(self, now_ns: int) -> bool:
        """Return whether the tenant's ceiling holds it."""
        place = self.place
        return place.is_spent() or (place.held and place.share.limited and place.limit_ready_ns() > now_ns)

    def progress(self, passed_ns: int, alone: bool, now_ns: int) -> int:
        """Charge the progress since the last call, `passed_ns` ago, and return it. `alone`: all others were held."""
        place, is_new = self.place, self.place.seen is not self.seen
        self.seen = place.seen
        launches, idle_ns = (self.launched(), self.rested_ns()) if is_new else (0, 0)  # idle tenants are seen rarely
        works = bool(launches or place.seen.in_flight or place.seen.waiting)
        rest_ns, self.resting_ns = (self.resting_ns, 0) if works else (0, self.resting_ns + passed_ns)
        if works:
            self.active_ns = now_ns
        place.alone.rested(launches, idle_ns if idle_ns < IDLE_NS else 0)
        cost_ns = place.alone.of(launches)
        self.claimed_ns += cost_ns
        self.carried_ns += cost_ns
        paid_ns = min(self.carried_ns, passed_ns)
        self.carried_ns = min(self.carried_ns - paid_ns, self.most_carried_ns())
        fades = max(0.0, 1 - passed_ns / WINDOW_NS)
        waits = place.held and not place.seen.in_flight
        took_ns = passed_ns + (rest_ns if rest_ns < IDLE_NS else 0) if works and not waits else 0
        self.busy_ns = self.busy_ns * fades + took_ns
        self.done_ns = self.done_ns * fades + paid_ns
        if alone:
            fades = max(0.0, 1 - passed_ns / ALONE_WINDOW_NS)
            self.alone_busy_ns = self.alone_busy_ns * fades + passed_ns
            self.alone_done_ns = self.alone_done_ns * fades + paid_ns
        place.count_up(now_ns)
        place.charge(passed_ns if alone else round(paid_ns))
        return round(paid_ns)


@dataclass(slots=True)
class _Device:
    """A concurrent device with several tenants. `shared_ns`: since when all of them may launch; 0: they take turns."""

    runners: list[_Runner] = field(default_factory=list)
    since_ns: int = 0  # when the phase began
    looked_ns: int = 0
    shared_ns: int = 0
    is_first: bool = True  # costs of tenants are unknown
    turns_rate: float = 0.0  # nanoseconds of progress in a nanosecond under turns, of all tenants
    checked_ns: int = 0
    done_ns: int = 0  # progress of all tenants since checked_ns
    alone: _Runner | None = None  # for this tenant all others were held at the last look
    has_held: bool = False  # a tenant was held in this phase
    due_ns: int = 0  # when to look again
    idle_ns: int = 0  # when idle tenants were last looked at
    pause_ns: int = FIRST_PAUSE_NS
    paused_ns: int = 0

    def begin_turns(self, now_ns: int) -> None:
        """Begin a phase of turns."""
        self.since_ns, self.shared_ns = now_ns, 0
        self.is_first = not all(runner.place.alone.is_known for runner in self.runners)
        for runner in self.runners:
            runner.begin()
            runner.place.alone.begin()

    def has_learned(self, now_ns: int) -> bool:
        """Look at the launches under turns, and return whether all tenants may launch at the same time from now on."""
        passed_ns = now_ns - max(self.since_ns, self.paused_ns)
        for runner in self.runners:
            runner.launched()
            runner.place.measured = passed_ns >= 0
        active = [runner.place.alone for runner in self.runners if runner.has_launched]
        if len(active) < 2 or now_ns < self.paused_ns or not all(cost.is_known for cost in active):
            return False
        need_ns, most_ns = (LEARN_NS, MOST_LEARN_NS) if self.is_first else (AGAIN_NS, MOST_AGAIN_NS)
        enough = all(cost.fresh_ns >= need_ns and cost.fresh_launches >= LEARN_LAUNCHES for cost in active)
        if not enough and passed_ns < most_ns:
            return False
        self.turns_rate = sum(cost.fresh_ns for cost in active) / passed_ns
        self.shared_ns = self.looked_ns = self.checked_ns = self.due_ns = now_ns
        self.done_ns, self.has_held = 0, False
        for runner in self.runners:
            runner.begin()
        return True

    def is_over(self, now_ns: int) -> bool:
        """Charge all progress since the last look. Return whether the tenants take turns from now on."""
        passed_ns, self.looked_ns = now_ns - self.looked_ns, now_ns
        free = [r for r in self.runners if (r.is_active(now_ns) and not r.place.held) or r.place.seen.in_flight]
        alone = free[0] if len(free) == 1 and any(runner.place.held for runner in self.runners) else None
        was_alone, self.alone = self.alone, alone
        for runner in self.runners:
            self.done_ns += runner.progress(passed_ns, runner is alone is was_alone, now_ns)
        is_any_unknown = any(runner.has_launched and not runner.place.alone.is_known for runner in self.runners)
        if is_any_unknown or now_ns - self.shared_ns >= self._holds_ns():
            return True
        if now_ns - self.checked_ns < CHECK_NS:
            return False
        passed_ns, self.checked_ns = now_ns - self.checked_ns, now_ns
        rate, self.done_ns = self.done_ns / passed_ns, 0
        wrong = [r for r in self.runners if r.claimed_ns > MOST_CLAIM * passed_ns + r.most_carried_ns()]
        for runner in self.runners:
            runner.claimed_ns = 0.0
        for runner in wrong:
            runner.place.alone.forget()
        if wrong:
            return True
        active = [runner for runner in self.runners if runner.is_active(now_ns)]
        is_any_slowed = any(runner.is_slowed() and not runner.is_stopped(now_ns) for runner in active)
        if len(active) < 2 or not is_any_slowed or rate >= LEAST_GAIN * min(1.0, self.turns_rate):
            self.pause_ns = FIRST_PAUSE_NS
            return False
        self.paused_ns, self.pause_ns = now_ns + self.pause_ns, min(2 * self.pause_ns, MOST_PAUSE_NS)
        return True

    def _holds_ns(self) -> int:
        """Return how long the tenants run at the same time before their costs are measured again."""
        if not self.has_held:
            return LATEST_NS
        return FIRST_NS if self.is_first else REFRESH_NS

    def held(self, now_ns: int) -> list[_Runner]:
        """Move up tenants that do not need their share. Return the tenants that are to be held."""
        active = [runner for runner in self.runners if runner.is_active(now_ns)]
        free = [runner for runner in active if not runner.is_stopped(now_ns)]
        for rank in {runner.place.share.rank for runner in free}:  # virtual times of two ranks cannot be compared
            first_ns = max(r.place.account.virtual_ns for r in free if r.place.share.rank == rank)
            for runner in self.runners:
                if runner.place.share.rank == rank and not (runner in free and runner.is_slowed()):
                    lag_ns = NEAR_NS if runner in free else 0
                    runner.place.account = runner.place.account.joining(first_ns - lag_ns)
        held = [runner for runner in active if _is_to_wait(runner, free)]
        self.has_held |= bool(held)
        self.due_ns = now_ns + _look_ns(free)
        return held

    def clocks(self) -> dict[int, int]:
        """Return for each priority (rank) the lowest virtual time of its tenants."""
        found: dict[int, int] = {}
        for runner in self.runners:
            rank, virtual_ns = runner.place.share.rank, runner.place.account.virtual_ns
            found[rank] = min(virtual_ns, found.get(rank, virtual_ns))
        return found

    def to_see(self) -> list[Place]:
        """Return the tenants that the next look must see. Idle tenants are seen less often."""
        if self.looked_ns - self.idle_ns >= IDLE_LOOK_NS:
            self.idle_ns = self.looked_ns
            return _places(self)
        return [runner.place for runner in self.runners if runner.is_active(self.looked_ns) or runner.place.held]


def _look_ns(free: Collection[_Runner]) -> int:
    """Return the time until the next look: until the first tenant may have to be held or let go.

    Progress is at most the time that passes, so it takes time until a tenant is ahead of a slowed one, or is not.
    """
    if any(runner.place.share.limited for runner in free):
        return LOOK_NS
    least_ns = MOST_LOOK_NS
    for other in filter(_Runner.is_slowed, free):
        for runner in free:
            if runner is other:
                continue
            ahead_ns = runner.place.account.virtual_ns - other.place.account.virtual_ns
            moves, left_ns = (other, ahead_ns - NEAR_NS) if runner.place.held else (runner, LAG_NS - ahead_ns)
            least_ns = min(least_ns, left_ns * moves.place.share.weight // PLAIN_WEIGHT)
    return max(LOOK_NS, least_ns)


def _is_to_wait(runner: _Runner, free: Collection[_Runner]) -> bool:
    """Return whether a tenant waits: at its ceiling, or for one of the tenants in `free`, which are below theirs."""
    if runner not in free:
        return True
    place, bound_ns = runner.place, NEAR_NS if runner.place.held else LAG_NS
    for other in free:
        if other is runner or not (other.is_slowed() and other.has_work) or other.place.share.rank > place.share.rank:
            continue
        ahead_ns = place.account.virtual_ns - other.place.account.virtual_ns
        if other.place.share.rank < place.share.rank or ahead_ns > bound_ns:
            return True
    return False


class Concurrent:
    """All concurrent devices that several tenants use."""

    def __init__(self, clocks: Clocks) -> None:
        self.numbers: frozenset[int] = frozenset()  # the concurrent devices
        self._devices: dict[int, _Device] = {}
        self._clocks = clocks

    def restart(self, places: dict[int, list[Place]], now_ns: int) -> list[Place]:
        """Begin with turns, on devices with another set of tenants than before.

        Take the tenants of all concurrent devices out of `places`, if they can run at the same time.

        Returns:
            Tenants that ran at the same time until now.
        """
        ended = list[Place]()
        for number in {*self._devices, *self.numbers.intersection(places)}:
            device, before = self._devices.setdefault(number, _Device()), _places(self._devices[number])
            may = number in self.numbers and number in places and _may(places[number])
            its = places.pop(number) if may else []
            if {id(place) for place in its} == {id(place) for place in before}:
                continue
            ended += before if device.shared_ns else []
            for place in before:
                place.concurrent = place.measured = False
            for place in its:
                place.concurrent = True
            device.runners = [_Runner(place) for place in its]
            device.pause_ns, device.paused_ns = FIRST_PAUSE_NS, 0  # these tenants may gain by what others did not
            device.begin_turns(now_ns)
        return ended

    def look(self, now_ns: int) -> tuple[list[Place], list[Place], list[Place]]:
        """Return tenants that may launch from now on, tenants that take turns, and tenants to hold or let go."""
        begin, end, change = list[Place](), list[Place](), list[Place]()
        for number, device in self._devices.items():
            if not device.runners:
                continue
            if not device.shared_ns:
                if device.has_learned(now_ns):
                    begin += _places(device)
                continue
            self._clocks.count(number).lent_ns += now_ns - device.looked_ns
            if device.is_over(now_ns):
                end += _places(device)
                device.begin_turns(now_ns)
                continue
            held = device.held(now_ns)
            for rank, virtual_ns in device.clocks().items():  # tenants that join later start here
                self._clocks.advance(number, rank, virtual_ns)
            change += [runner.place for runner in device.runners if runner.place.held != (runner in held)]
        return begin, end, change

    def to_see(self) -> list[Place]:
        """Return the tenants that the next look must see."""
        return [place for device in self._devices.values() if device.shared_ns for place in device.to_see()]

    def due_ns(self) -> int:
        """Return when the next look is due; NEVER_NS: tenants take turns, which cause looks."""
        return min((device.due_ns for device in self._devices.values() if device.shared_ns), default=NEVER_NS)


def _may(places: Collection[Place]) -> bool:
    """Return whether these tenants of a device can run at the same time: there are several, none of them has contexts
    on another device, and none is inside another one.
    """
    return len(places) > 1 and all(len(place.seen.devices) == 1 and not place.above for place in places)


def _places(device: _Device) -> list[Place]:
    return [runner.place for runner in device.runners]
