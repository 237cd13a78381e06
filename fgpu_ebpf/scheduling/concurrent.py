"""Concurrent devices: all tenants launch at the same time, and a tenant that is ahead of its share waits.

The *progress* of a tenant is the number of its launches times the cost of a launch while the tenant has the device
alone, and at most the time that passes. A tenant is charged its progress, not the time for which its gate is open.
Therefore two tenants can together progress by more than one second in one second. The cost of a launch is measured
whenever all other tenants are held or idle. If the cost of a tenant's launches is unknown, or was measured long ago,
all other tenants are held for a short *window*.

A tenant is *slowed* if the time for which the tenant had work in flight exceeds its progress. *Virtual time* is
progress divided by the weight. A tenant is held if it is ahead of a slowed tenant by more than LAG_NS of virtual time.
A tenant that is behind and not slowed does not need its share, so its virtual time is moved up. A tenant is also held
at its ceiling, and while a tenant of higher priority is slowed. If slowed tenants together progress no faster than
under turns, all tenants take turns, and the next trial follows after a pause.

A tenant that reports false launches changes its own progress. The tenant can gain a part of the time for which other
tenants are held. This gain is bounded, because the time for which other tenants are held for a tenant is charged to
that tenant.

The module runs in threads of the gatekeeper that hold the time slicer's lock, does no I/O and reads no clock. Times are
CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from fgpu_ebpf.scheduling.claim_trust import MOST_FLIGHT_NS
from fgpu_ebpf.scheduling.fair_queue import PLAIN_WEIGHT
from fgpu_ebpf.scheduling.reports import NOTHING, Seen
from fgpu_ebpf.scheduling.state import NEVER_NS, Place
from fgpu_ebpf.scheduling.virtual_clock import Clocks

MS, SECOND = 1_000_000, 1_000_000_000
MEASURE_NS, MEASURE_LAUNCHES = 80 * MS, 4  # the minimum time and launches of a measurement of the cost of a launch
MOST_MEASURE_NS = 400 * MS  # the end of a window, because a tenant may launch nothing
FIRST_PARTS, PARTS = 10, 100  # windows of a tenant take at most 1/10 of the time if its cost is unknown, else 1/100
REFRESH_NS, LATEST_NS = 20 * SECOND, 300 * SECOND  # costs are measured again: after holding, or if no tenant was held
FIRST_REFRESH_NS = 2 * SECOND  # until the second measurement: while the first is wrong, no tenant may be held
STALE_NS = 5 * SECOND  # a tenant that was idle for this time may do other work now, so its cost is measured again
LOOK_NS, MOST_LOOK_NS = 4 * MS, 12 * MS  # bounds of the time between checks: less if a tenant may soon be held
IDLE_LOOK_NS = 24 * MS  # the period in which idle tenants are checked, and all tenants while no tenant is slowed
LAG_NS, NEAR_NS = 10 * MS, 6 * MS  # a tenant that is ahead by LAG_NS waits until it is ahead by less than NEAR_NS
IDLE_NS = 50 * MS  # a tenant without work for this time has no missed share
SLOW_NS = 100 * MS  # the time over which the slowing of a tenant is measured
SLOWED = 1.05  # a tenant is slowed if its launches take this many times their cost while alone
CARRY_NS = 20 * MS  # progress that is reported in one moment may have taken this time
CHECK_NS = 500 * MS  # the period of the comparison with turns
MOST_CLAIM = 1.1  # a cost is wrong if launches cost this many times the time that passes
LEAST_GAIN = 0.97  # tenants take turns if all progress together falls below this part of the time that passes
FIRST_PAUSE_NS, MOST_PAUSE_NS, LONGER = SECOND, 16 * SECOND, 4  # a pause is this many times as long as the last pause


@dataclass(eq=False, slots=True)
class _Runner:
    """A tenant on a concurrent device. `busy_ns`, `done_ns`: the recent time with work, and the recent progress."""

    place: Place
    device: int
    seen: Seen = NOTHING  # the last observation that was counted
    launched: int = 0  # launches in the time of the last count
    launched_ns: int = 0  # when the tenant last launched
    took_ns: int = 0  # the part of this time in which the tenant had work
    active_ns: int = 0  # when the tenant last had work
    carried_ns: float = 0.0  # reported progress that was not charged yet
    resting_ns: int = 0  # the time without work since the last work
    busy_ns: float = 0.0
    done_ns: float = 0.0
    claimed_ns: float = 0.0  # reported progress since the last check
    due_ns: int = 0  # when the cost should be measured again
    measured_ns: int = -LATEST_NS  # when the cost was measured
    refresh_ns: int = FIRST_REFRESH_NS  # until the next measurement; twice as long after each measurement

    def begin(self, now_ns: int) -> None:
        """Count the tenant's launches and times from now on."""
        self.active_ns = self.active_ns or now_ns  # a new tenant may have work
        self.seen, self.launched_ns = self.place.seen, now_ns
        self.carried_ns = self.busy_ns = self.done_ns = self.claimed_ns = 0.0

    def is_active(self, now_ns: int) -> bool:
        """Return whether the tenant has work, or had work a short time ago."""
        return now_ns - self.active_ns < IDLE_NS

    def is_slowed(self) -> bool:
        """Return whether the tenant progresses less than it would alone on the device."""
        return self.place.held or self.busy_ns > SLOWED * self.done_ns

    def is_measured(self) -> bool:
        """Return whether the measurement of the tenant's cost is complete."""
        cost = self.place.alone
        return cost.fresh_ns >= MEASURE_NS and cost.fresh_launches >= MEASURE_LAUNCHES

    def expire(self) -> None:
        """Request a new measurement of the cost, as soon as possible."""
        self.place.alone.begin()
        self.due_ns, self.measured_ns, self.refresh_ns = 0, -LATEST_NS, FIRST_REFRESH_NS

    def is_due(self, now_ns: int, held_ns: int) -> bool:
        """Return whether the cost has to be measured now. `held_ns`: when a tenant was last held for another tenant."""
        if self.is_measured():
            self.place.alone.renew()
            self.measured_ns, self.due_ns = now_ns, now_ns + self.refresh_ns
            self.refresh_ns = min(2 * self.refresh_ns, REFRESH_NS)
        elif self.due_ns <= now_ns < self.measured_ns + LATEST_NS and now_ns - held_ns > REFRESH_NS:
            self.due_ns = now_ns + REFRESH_NS
        return now_ns >= self.due_ns

    @property
    def virtual_ns(self) -> int:
        """The tenant's virtual time on the device."""
        return self.place.accounts.of(self.device).virtual_ns

    @property
    def has_work(self) -> bool:
        """True if the tenant had work at the last observation. A tenant without work cannot be slowed."""
        return not self.resting_ns

    def most_carried_ns(self) -> float:
        """Return how long the work that was reported in one moment may take: at least the cost of one launch."""
        return max(CARRY_NS, min(SECOND, self.place.alone.of(1)))

    def is_stopped(self, now_ns: int) -> bool:
        """Return whether the tenant is held by its ceiling."""
        place = self.place
        return place.is_spent() or (place.held and place.share.limited and place.limit_ready_ns() > now_ns)

    def count(self, passed_ns: int, now_ns: int) -> None:
        """Count the launches and the time with work since the last call, `passed_ns` ago."""
        place, self.launched = self.place, max(0, self.place.seen.launches - self.seen.launches)
        self.launched_ns = now_ns if self.launched else self.launched_ns
        since_ns = now_ns - max(place.seen.busy_until_ns, place.seen.wanted_ns, self.launched_ns)
        if since_ns > MOST_FLIGHT_NS and not place.held:
            place.seen = place.seen._replace(in_flight=0, waiting=False)  # stopped, or the end was not reported
        self.seen = place.seen
        works = bool(self.launched or place.seen.in_flight or place.seen.waiting)
        rest_ns, self.resting_ns = (self.resting_ns, 0) if works else (0, self.resting_ns + passed_ns)
        waits = place.held and not place.seen.in_flight
        self.took_ns = passed_ns + (rest_ns if rest_ns < IDLE_NS else 0) if works and not waits else 0
        self.active_ns = now_ns if works else self.active_ns
        if rest_ns >= STALE_NS:
            self.expire()

    def progress(self, passed_ns: int, alone: bool) -> int:
        """Return the progress in the time that was counted. `alone`: the tenant had the device alone in this time."""
        place, launches, took_ns = self.place, self.launched, self.took_ns
        if alone:
            place.alone.observe(launches, took_ns)
        else:
            place.alone.interrupt(is_idle=not self.has_work)
        cost_ns = place.alone.of(launches) if place.alone.is_known else took_ns
        self.claimed_ns += cost_ns
        self.carried_ns += cost_ns
        paid_ns = min(self.carried_ns, passed_ns)
        self.carried_ns = min(self.carried_ns - paid_ns, self.most_carried_ns())
        fades = max(0.0, 1 - passed_ns / SLOW_NS)
        self.busy_ns = self.busy_ns * fades + took_ns
        self.done_ns = self.done_ns * fades + paid_ns
        return round(paid_ns)

    def charge(self, ns: int, now_ns: int) -> None:
        """Charge the tenant for its progress."""
        self.place.count_up(now_ns)
        self.place.charge(ns)


@dataclass(slots=True)
class _Device:
    """A concurrent device with several tenants. `shared_ns`: since when all tenants may launch; 0 under turns."""

    runners: list[_Runner] = field(default_factory=list)
    shared_ns: int = 0
    looked_ns: int = 0
    checked_ns: int = 0
    slowed_ns: int = 0  # the time since the last comparison with turns in which tenants slowed each other
    done_ns: int = 0  # the progress of all tenants in this time
    has_gained: bool = False  # at the last comparison
    alone: _Runner | None = None  # the tenant that had the device alone at the last check
    alone_ns: int = 0  # since when
    window: _Runner | None = None  # the tenant whose cost is measured while all others are held
    window_ns: int = 0  # since when
    held_ns: int = 0  # when a tenant was last held for another tenant
    due_ns: int = 0  # when the next check is due
    idle_ns: int = 0  # when idle tenants were last checked
    watched: list[Place] = field(default_factory=list)  # the tenants that the next check must observe
    pause_ns: int = FIRST_PAUSE_NS
    paused_ns: int = 0

    def try_to_begin(self, now_ns: int) -> bool:
        """Let all tenants launch at the same time from now on. Return False if a pause forbids this trial."""
        if now_ns < self.paused_ns:
            return False
        self.shared_ns = self.looked_ns = self.checked_ns = self.due_ns = now_ns
        self.slowed_ns, self.done_ns, self.has_gained = 0, 0, False
        self.alone = self.window = None
        self.idle_ns, self.watched = now_ns, _places(self)
        for runner in self.runners:
            runner.begin(now_ns)
        return True

    def is_over(self, now_ns: int) -> bool:
        """Charge all progress since the last check. Return whether the tenants take turns from now on."""
        passed_ns, self.looked_ns = now_ns - self.looked_ns, now_ns
        for runner in self.runners:
            runner.count(passed_ns, now_ns)
        working = [r for r in self.runners if (r.is_active(now_ns) and not r.place.held) or r.place.seen.in_flight]
        was_alone, self.alone = self.alone, working[0] if len(working) == 1 else None
        is_settled = now_ns - passed_ns > self.alone_ns  # before, kernels ran that had begun beside other kernels
        is_settled &= len(self.watched) == len(self.runners)  # no other tenant launched unobserved
        self.alone_ns = self.alone_ns if self.alone is was_alone else now_ns
        holds, done_ns = any(runner.place.held for runner in self.runners), 0
        for runner in self.runners:
            is_alone = runner is self.alone is was_alone
            progress_ns = runner.progress(passed_ns, is_alone and is_settled)
            runner.charge(passed_ns if is_alone and holds else progress_ns, now_ns)
            done_ns += progress_ns
        if now_ns - self.checked_ns >= CHECK_NS:
            self._check_claims(now_ns)
        active = [runner for runner in self.runners if runner.is_active(now_ns)]
        slowed = [runner for runner in active if runner.is_slowed() and not runner.is_stopped(now_ns)]
        if len(active) < 2 or not slowed or self.window or not all(r.place.alone.is_known for r in active):
            return False
        self.slowed_ns += passed_ns
        self.done_ns += done_ns
        if self.slowed_ns < CHECK_NS:
            return False
        gains, self.done_ns, self.slowed_ns = self.done_ns >= LEAST_GAIN * self.slowed_ns, 0, 0
        before, self.has_gained = self.has_gained, gains
        if gains:
            self.pause_ns = FIRST_PAUSE_NS
            return False
        for runner in active:
            runner.expire()
        if before:  # the tenants' work may have changed, so the next comparison uses new costs
            return False
        self.shared_ns, self.paused_ns = 0, now_ns + self.pause_ns
        self.pause_ns = min(LONGER * self.pause_ns, MOST_PAUSE_NS)
        return True

    def _check_claims(self, now_ns: int) -> None:
        """Discard the costs of tenants that have reported more work since the last check than is possible."""
        passed_ns, self.checked_ns = now_ns - self.checked_ns, now_ns
        for runner in self.runners:
            if runner.claimed_ns > MOST_CLAIM * passed_ns + runner.most_carried_ns():
                runner.place.alone.forget()
                runner.expire()
            runner.claimed_ns = 0.0

    def _measured(self, free: Collection[_Runner], now_ns: int) -> _Runner | None:
        """Return the tenant that has the device alone now, to measure the cost of its launches."""
        if runner := self.window:
            passed_ns = now_ns - self.window_ns
            if runner in free and not runner.is_measured() and passed_ns < MOST_MEASURE_NS:
                return runner
            runner.due_ns = now_ns + passed_ns * (PARTS if runner.place.alone.is_known else FIRST_PARTS)
        self.window = None
        if len(free) < 2:
            return None
        first = min(runner.place.share.rank for runner in free)
        for runner in sorted(free, key=lambda r: r.virtual_ns):
            if runner.place.share.rank == first and runner.is_due(now_ns, self.held_ns):
                self.window, self.window_ns = runner, now_ns
                return runner
        return None

    def held(self, now_ns: int) -> list[_Runner]:
        """Move up the virtual time of tenants that do not need their share. Return the tenants that are to be held."""
        active = [runner for runner in self.runners if runner.is_active(now_ns)]
        free = [runner for runner in active if not runner.is_stopped(now_ns)]
        for rank in {runner.place.share.rank for runner in free}:  # virtual times of two ranks cannot be compared
            first_ns = max(r.virtual_ns for r in free if r.place.share.rank == rank)
            for runner in self.runners:
                if runner.place.share.rank == rank and not (runner in free and runner.is_slowed()):
                    runner.place.accounts.move_up(runner.device, first_ns - (NEAR_NS if runner in free else 0))
        if window := self._measured(free, now_ns):
            self.due_ns, self.watched = now_ns + LOOK_NS, _places(self)
            return [runner for runner in self.runners if runner is not window]
        held = [runner for runner in active if _is_to_wait(runner, free)]
        self.held_ns = now_ns if any(runner in free for runner in held) else self.held_ns
        self.due_ns = now_ns + (LOOK_NS if self.alone_ns == now_ns else _look_ns(free, active))
        self._watch(now_ns)
        return held

    def clocks(self) -> dict[int, int]:
        """Return for each priority (rank) the lowest virtual time of its tenants."""
        found: dict[int, int] = {}
        for runner in self.runners:
            rank, virtual_ns = runner.place.share.rank, runner.virtual_ns
            found[rank] = min(virtual_ns, found.get(rank, virtual_ns))
        return found

    def _watch(self, now_ns: int) -> None:
        """Set `watched`. Idle tenants are observed less often."""
        if now_ns - self.idle_ns >= IDLE_LOOK_NS:
            self.idle_ns, self.watched = now_ns, _places(self)
        else:
            self.watched = [runner.place for runner in self.runners if runner.is_active(now_ns) or runner.place.held]


def _look_ns(free: Collection[_Runner], active: Collection[_Runner]) -> int:
    """Return the time until the next check, which is due when the first tenant may have to be held or released.

    Progress is at most the time that passes, so a tenant gets ahead of a slowed tenant only after some time.
    """
    if any(runner.place.share.limited for runner in free):
        return LOOK_NS
    slowed = [runner for runner in free if runner.is_slowed()]
    least_ns = MOST_LOOK_NS if slowed or any(r.place.share.limited for r in active) else IDLE_LOOK_NS
    for other in slowed:
        for runner in (runner for runner in free if runner is not other):
            ahead_ns = runner.virtual_ns - other.virtual_ns
            moves, left_ns = (other, ahead_ns - NEAR_NS) if runner.place.held else (runner, LAG_NS - ahead_ns)
            least_ns = min(least_ns, left_ns * moves.place.share.weight // PLAIN_WEIGHT)
    return max(LOOK_NS, least_ns)


def _is_to_wait(runner: _Runner, free: Collection[_Runner]) -> bool:
    """Return whether a tenant waits: at its ceiling, or for one of the tenants in `free` (below their ceilings)."""
    if runner not in free:
        return True
    place, bound_ns = runner.place, NEAR_NS if runner.place.held else LAG_NS
    for other in free:
        if other is runner or not (other.is_slowed() and other.has_work) or other.place.share.rank > place.share.rank:
            continue
        if other.place.share.rank < place.share.rank or runner.virtual_ns - other.virtual_ns > bound_ns:
            return True
    return False


class Concurrent:
    """All concurrent devices that several tenants use."""

    def __init__(self, clocks: Clocks) -> None:
        self.numbers: frozenset[int] = frozenset()  # the concurrent devices
        self._devices: dict[int, _Device] = {}
        self._clocks = clocks

    def restart(self, places: dict[int, list[Place]], now_ns: int) -> list[Place]:
        """Restart each concurrent device after a change of its set of tenants.

        Remove the tenants of all concurrent devices from `places`, if these tenants can run at the same time.

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
                place.concurrent = False
            for place in its:
                place.concurrent = True
            known = {id(runner.place): runner for runner in device.runners}
            device.runners, device.shared_ns = [known.get(id(place)) or _Runner(place, number) for place in its], 0
            device.pause_ns, device.paused_ns = FIRST_PAUSE_NS, 0  # these tenants may gain, unlike the tenants before
        return ended

    def look(self, now_ns: int) -> tuple[list[Place], list[Place], list[Place]]:
        """Return tenants that may launch from now on, tenants that take turns, and tenants to hold or release."""
        begin, end, change = list[Place](), list[Place](), list[Place]()
        for number, device in self._devices.items():
            if not device.shared_ns:
                if device.runners and device.try_to_begin(now_ns):
                    begin += _places(device)
                continue
            self._clocks.count(number).lent_ns += now_ns - device.looked_ns
            if device.is_over(now_ns):
                end += _places(device)
                continue
            held = device.held(now_ns)
            for rank, virtual_ns in device.clocks().items():  # tenants that join later start at this virtual time
                self._clocks.advance(number, rank, virtual_ns)
            change += [runner.place for runner in device.runners if runner.place.held != (runner in held)]
        return begin, end, change

    def to_see(self) -> list[Place]:
        """Return the tenants that the next check must observe."""
        return [place for device in self._devices.values() if device.shared_ns for place in device.watched]

    def due_ns(self) -> int:
        """Return when the next check is due; NEVER_NS: tenants take turns, which cause checks."""
        return min((device.due_ns for device in self._devices.values() if device.shared_ns), default=NEVER_NS)


def _may(places: Collection[Place]) -> bool:
    """Return whether these tenants of a device can run at the same time.

    There must be several tenants, no tenant may have contexts on another device, and no tenant may be inside another
    tenant.
    """
    return len(places) > 1 and all(len(place.seen.devices) == 1 and not place.above for place in places)


def _places(device: _Device) -> list[Place]:
    return [runner.place for runner in device.runners]
