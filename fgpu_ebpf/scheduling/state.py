"""The state of tenants that share devices' time, and of their turns.

The module runs in threads of the gatekeeper that hold the time slicer's lock. The module computes when something is
due, and `turns` makes the decisions. A *gang* is a tenant on several devices. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from fgpu_ebpf import abi
from fgpu_ebpf.scheduling import fair_queue
from fgpu_ebpf.scheduling.accounts import Accounts
from fgpu_ebpf.scheduling.alone_cost import AloneCost
from fgpu_ebpf.scheduling.claim_trust import MOST_FLIGHT_NS, Trust
from fgpu_ebpf.scheduling.counters import Counts
from fgpu_ebpf.scheduling.fair_queue import Share, Waiter
from fgpu_ebpf.scheduling.nested_shares import Unit, effective
from fgpu_ebpf.scheduling.observed_usage import Observed
from fgpu_ebpf.scheduling.reports import NOTHING, Seen
from fgpu_ebpf.scheduling.think_times import IDLE_NS, ThinkTimes, most_patience_ns

LOOK_NS, MOST_LOOK_NS = 1_750_000, 10_000_000  # the bounds of the time between checks of an owner with rivals
BUSY_PARTS = 16  # this time is 1/16 of the time for which the owner was busy without a pause
GUESS_PARTS = 4  # the estimate of work in flight may be too low by 1/4
FLOOR_TURN_NS = 4_000_000  # the length of a turn by the floor, before a higher priority may end it
FLOOR_PARTS = fair_queue.FLOOR_NS // FLOOR_TURN_NS  # the floor's next turn waits this many times the last excess
START_NS = 3_000_000  # the time that a thread at the gate has to launch after the gate has opened
LATE_NS = 200_000  # work that should have ended this long ago may be waiting for other work
LEAD_NS = 1_000_000  # the next turn may begin this long before the end of a drain
MORE_NS = 250_000  # tolerance of LEAD_NS; launches may have moved the end, and another check costs more than this time
SOON_NS = 1_000_000  # if another step is due within this time, no extra check is made
OVERTAKEN_PARTS = 4  # a turn lasts 1/4 quantum if a tenant that would have been first was idle at its beginning
LASTING_NS = 1_000_000_000  # turns may be longer among tenants that were busy for this long without a pause
# The reported beginning and end of a turn shorten its charge by at most this time each, and at most 1/40 of a quantum.
SPAN_NS, SPAN_PARTS = 500_000, 40
NEVER_NS = 2**63
_OPEN, _GATED = int(abi.Gate.OPEN), int(abi.Gate.GATED)


@dataclass(slots=True)
class Turn:
    """A turn of one tenant on its devices. If `closing_ns` is 0, the gates are open.

    The tenant is charged from `begins_ns` on. This time is later than `opened_ns` if the previous turn has not drained
    yet. The current quantum began at `since_ns`, when the tenant was selected by its virtual time on each device,
    `virtual_ns`.
    """

    devices: set[int]
    number: int
    floor: bool
    opened_ns: int
    begins_ns: int
    charged_ns: int
    ends_ns: int
    active_ns: int
    launches: int
    since_ns: int
    virtual_ns: dict[int, int]
    closing_ns: int = 0
    deadline_ns: int = 0
    handed_ns: int = 0  # the `begins_ns` of the next turn on some of these devices; 0: not handed over yet
    rested: bool = False  # the gates were closed because there was no work, while no tenant waited
    rest_ns: int = 0  # how long the tenant had been without work at the last check; 0: the tenant had work
    cut: bool = False  # the gates were closed although the tenant has more work, or probably has


@dataclass(slots=True)
class Place:
    """The state of a tenant with a share.

    `above`: the units that contain the tenant, innermost first. `asked`: the tenant's share without the limits of these
    units.
    """

    tenant: int
    share: Share
    accounts: Accounts
    seen: Seen = NOTHING
    free_on: frozenset[int] = frozenset()
    lent: bool = False  # the tenant is free on its device together with the device's other tenants
    held: bool = False  # the tenant is lent, but must wait
    turn: Turn | None = None
    since_ns: int | None = None  # since when the tenant has requested a turn; None: no request
    number: int = 0  # the number of its last turn
    late_ns: int = 0  # when its last turn ended with work in flight; 0: nothing is late
    unlifted_ns: int = 0  # waiting for the floor counts from this time on
    pause_ns: int = 0
    pause_until_ns: int = 0
    cut: bool = False  # the last turn was cut, and the tenant was not checked afterwards
    reports_ends: bool = True  # the tenant reported the last end of work that outlasted its estimate in a closing turn
    busy_ns: int = 0  # the time of the tenant's turns since it was last idle
    held_back: bool = False  # the tenant's limit delays the tenant, and this delay was counted
    counts: defaultdict[int, Counts] = field(default_factory=lambda: defaultdict(Counts))  # by device
    trust: Trust = field(default_factory=Trust)
    observed: defaultdict[int, Observed] = field(default_factory=lambda: defaultdict(Observed))  # by device
    thinks: ThinkTimes = field(default_factory=ThinkTimes)
    alone: AloneCost = field(default_factory=AloneCost)
    concurrent: bool = False  # the device is concurrent; turns must not overlap, because kernels would slow each other
    asked: Share = field(default_factory=Share)
    above: tuple[Unit, ...] = ()

    def waiter(self, now_ns: int, virtual_ns: int, inner_ns: int) -> Waiter:
        """Return the tenant as a waiter, from `now_ns` on if the tenant requests no turn yet."""
        devices, since_ns = self.seen.devices, max(now_ns if self.since_ns is None else self.since_ns, self.unlifted_ns)
        unlifted_ns = self.above[-1].unlifted_ns(devices) if self.above else 0
        return Waiter(self.tenant, self.share, virtual_ns, devices, since_ns, inner_ns, unlifted_ns)

    def without_reports(self, number: int) -> Place:
        """Return a state without reports, with the account and the counters. The new `number` makes waiters report."""
        return Place(
            self.tenant, self.share, self.accounts, number=number, counts=self.counts, trust=self.trust,
            asked=self.asked, above=self.above,
        )  # fmt: skip

    def virtual_ns(self, devices: Iterable[int]) -> dict[int, int]:
        """Return the virtual time of the outermost unit or, without units, of the tenant, by device."""
        return (self.above[-1] if self.above else self.accounts).virtual_ns(devices)

    def begins(self, devices: Collection[int]) -> dict[int, int]:
        """Record the beginning of a turn or quantum in the unit's clocks; return the virtual times that order turns."""
        for unit in self.above[-1:]:
            for device, own_ns in self.accounts.virtual_ns(devices).items():
                unit.clocks[device] = max(unit.clocks.get(device, 0), own_ns)
        return self.virtual_ns(devices)

    def own_clocks(self, clocks: Mapping[int, int]) -> Mapping[int, int]:
        """Return the clocks of the outermost unit or, without units, of the devices. `clocks`: the devices' clocks."""
        return {device: self.above[-1].clocks.get(device, 0) for device in clocks} if self.above else clocks

    def change(self, above: tuple[Unit, ...], now_ns: int) -> None:
        """Set the units around the tenant.

        The tenant gets no credit for the time before if the outermost unit, the priority or the limit changed.
        """
        is_elsewhere, was = above[-1:] != self.above[-1:], self.share
        self.above, self.share = above, effective(self.asked, above)
        self.accounts.change(self.share, now_ns, is_elsewhere)
        self.trust.standing = above[-1].standing if above else self.trust.standing
        self.pause_until_ns = 0
        if self.share.limit_millionths != was.limit_millionths:
            self.accounts.left.clear()

    def clear(self) -> None:
        """Forget the reports and the pauses of processes that have exited."""
        self.seen, self.free_on = NOTHING, frozenset()
        self.late_ns = self.busy_ns = self.pause_ns = self.pause_until_ns = 0

    def count_up(self, now_ns: int) -> None:
        """Add the time that limits have allowed since the last call."""
        for accounts in (self.accounts, *self.above):
            accounts.count_up(self._devices(), now_ns)

    def join(self, clocks: Mapping[int, int], now_ns: int, is_first: bool) -> None:
        """Record that the tenant requests a turn, or uses a new device, without credit for idle time.

        `clocks`: the devices' clocks. `is_first`: no other tenant of its unit has or requests a turn.
        """
        for unit in self.above:
            unit.join_inside(clocks, now_ns, is_first)
        self.accounts.join(self.own_clocks(clocks), now_ns)

    def charge(self, ns: int, devices: Collection[int] = ()) -> None:
        """Charge the tenant and its units for `ns` of the time of `devices`, by default of its turn's devices."""
        ns, devices = max(0, ns), devices or self._devices()
        self.accounts.charge(devices, ns)
        for device in devices:
            self.counts[device].owned_ns += ns
        for unit in self.above:
            unit.charge(devices, ns)

    def observe(self, device: int, ran_ns: int, now_ns: int) -> None:
        """Compare the tenant's time on a device with the time that NVML reports."""
        short_ns = self.observed[device].short_ns(ran_ns, self.owned_ns(device), now_ns)
        if self.share.limited:
            self.count_up(now_ns)
            self.charge(short_ns, (device,))

    def is_unit(self) -> bool:
        """Return whether other tenants are inside this tenant."""
        return bool(self.above) and self.above[0].level == self.tenant

    def owned_ns(self, device: int) -> int:
        """Return the device time of the tenant and all tenants inside, which NVML does not distinguish."""
        return self.above[0].owned_ns(device) if self.is_unit() else self.counts[device].owned_ns

    def lifted(self, turn: Turn, passed_ns: int) -> None:
        """Record the end of a turn that the floor gave. A turn that was too long delays the next turn in proportion."""
        over_ns = passed_ns - turn.opened_ns - FLOOR_TURN_NS - abi.BUDGET_NS
        self.unlifted_ns = passed_ns + FLOOR_PARTS * max(0, over_ns)
        for unit in self.above[-1:]:
            unit.lifted(turn.devices, self.unlifted_ns)

    def limit_ready_ns(self) -> int:
        """Return the earliest time at which all limits allow the tenant to begin a turn."""
        ready_ns = self.accounts.ready_ns(self.seen.devices)
        return max(ready_ns, *(unit.ready_ns(self.seen.devices) for unit in self.above)) if self.above else ready_ns

    def is_spent(self) -> bool:
        """Return whether a limit leaves no time in hand."""
        return self.share.limited and any(each.is_spent(self._devices()) for each in (self.accounts, *self.above))

    def hold_back(self, is_new: bool) -> None:
        """Record that a limit delays the tenant. `is_new`: this delay was not counted yet."""
        self.held_back = True
        for device in self._devices():
            self.counts[device].throttled += is_new

    def _devices(self) -> Collection[int]:
        return self.turn.devices if self.turn else self.seen.devices

    def _spent_ns(self) -> int:
        """Return when a turn that continues will have used up the time in hand. The tenant must have a ceiling."""
        limited = [each for each in (self.accounts, *self.above) if each.share.limited]
        return min(each.spent_ns(self._devices()) for each in limited)

    def is_open(self) -> bool:
        """Return whether the tenant may launch on at least one of its devices."""
        return bool(self.free_on and not self.held) or (self.turn is not None and not self.turn.closing_ns)

    def gate(self, device: int) -> int:
        """Return the word that the tenant's control pages have for the gate of a device."""
        if device in self.free_on:
            opened = 0 if self.held else _OPEN
            return self.number << abi.GATE_SHIFT | _GATED | opened if self.lent else _OPEN  # gated: launches count
        is_open = self.turn is not None and device in self.turn.devices and not self.turn.closing_ns
        return self.number << abi.GATE_SHIFT | _GATED | (_OPEN if is_open else 0)

    def ready_ns(self) -> int:
        """Return when the tenant may begin a turn, by its limits and its pause."""
        return max(self.limit_ready_ns(), self.pause_until_ns)

    def claim_ns(self, now_ns: int) -> int:
        """Return how long the work in flight takes from now, by the tenant's own report."""
        if not self.seen.in_flight or self.seen.busy_until_ns <= now_ns:
            return 0
        return min(self.seen.busy_until_ns - now_ns, MOST_FLIGHT_NS)

    def flight_ns(self, now_ns: int) -> int:
        """Return how long the work in flight takes from now, as far as the tenant's report is trusted."""
        claim_ns = self.claim_ns(now_ns)
        return min(claim_ns, self.trust.believed_ns(now_ns)) if claim_ns else 0

    def unpaid_ns(self, now_ns: int) -> int:
        """Return the time to be charged in addition if the tenant's turn ends with the work in flight."""
        since_ns = max(self.turn.charged_ns, self.begun_ns(self.turn)) if self.turn else now_ns
        return max(0, now_ns - since_ns) + self.flight_ns(now_ns)

    def is_passing(self, turn: Turn, now_ns: int) -> bool:
        """Return whether the tenant's turn is near enough to its end for the next turn to begin."""
        if turn.handed_ns:
            return True
        if not turn.closing_ns or len(turn.devices) > 1 or self.concurrent:  # kernels of a gang may wait for others
            return False
        left_ns = self.flight_ns(now_ns)
        if not left_ns and self.reports_ends:  # the estimate was too short, and the tenant will report the end
            return False
        return left_ns <= LEAD_NS + MORE_NS

    def is_preempted(self) -> bool:
        """Return whether the tenant's turn was preempted and the next tenant's turn has been granted.

        The tenant queues again at the next step of the time slicer, when its turn should have drained.
        """
        return self.turn is not None and self.turn.handed_ns > 0 and self.turn.cut

    def judge(self, turn: Turn, overrun: bool, now_ns: int) -> None:
        """Record whether an ended turn has left work in flight, and compare the end with the tenant's reports."""
        for device in turn.devices:
            self.counts[device].overruns += overrun
        self.late_ns = now_ns if overrun else 0
        self.trust.judge(overrun, self.seen.drained, bool(self.seen.devices), now_ns)
        if overrun or self.seen.was_found_on_arrival():
            self.reports_ends = False
        elif not turn.cut and self.seen.ended_ns > turn.closing_ns:  # the tenant only seemed to be idle
            self.reports_ends, turn.cut = True, self.thinks.are_short(self.share.quantum_ns)

    def meets_ns(self, turn: Turn) -> int:
        """Return when to check if CUDA kernels of a gang wait for kernels behind closed gates; 0: never."""
        seen = self.seen
        may = turn.closing_ns and len(turn.devices) > 1 and seen.waiting and not seen.drained and not self.late_ns
        return seen.busy_until_ns + LATE_NS if may else 0

    def drain_due_ns(self, turn: Turn, is_wanted: bool, now_ns: int) -> int:
        """Return when to check a closing turn next.

        A check is due when the next turn may begin, when CUDA kernels of a gang may wait for kernels behind closed
        gates, and when the turn ends.
        """
        passes_ns = self.seen.busy_until_ns - LEAD_NS if is_wanted and not turn.handed_ns else 0
        return min([turn.deadline_ns, *(at for at in (self.meets_ns(turn), passes_ns) if at > now_ns)])

    def ends_ns(self, turn: Turn, rivals: Collection[Place]) -> int:
        """Return when the turn ends, if `rivals` wait for a turn now.

        The turn ends early for a rival that was idle when the turn began and would have been first. The turn ends later
        if all tenants are busy without a pause.
        """
        for rival in rivals:
            if (rival.since_ns or 0) > turn.since_ns and _was_first(rival, turn):
                return min(turn.ends_ns, turn.since_ns + self.share.quantum_ns // OVERTAKEN_PARTS)
        if self.busy_ns < LASTING_NS or not rivals:
            return turn.ends_ns
        for rival in rivals:
            if rival.busy_ns < LASTING_NS:
                return turn.ends_ns
        return turn.ends_ns + fair_queue.longer_ns(self.share, [rival.share for rival in rivals])

    def is_idle(self, turn: Turn, now_ns: int) -> bool:
        """Return whether the tenant has had no work for so long that its turn ends."""
        return now_ns - turn.active_ns >= self._patience_ns()

    def _patience_ns(self) -> int:
        """Return how long the tenant may be without work in its turn, with a margin if work is in flight."""
        if self.seen.waiting:
            return START_NS
        if not self.seen.in_flight:
            return self.thinks.patience_ns(self.share.quantum_ns)
        guess_ns = max(0, self.seen.busy_until_ns - self.seen.wanted_ns)
        return max(IDLE_NS + guess_ns // GUESS_PARTS, most_patience_ns(self.share.quantum_ns))

    def waits_for(self, owner: Place) -> bool:
        """Return whether this tenant waits for `owner` and has no higher priority than `owner`.

        The result is False while late work of this tenant is in flight, because the end of this work must be detected.
        """
        if not owner.turn or owner is self or self.late_ns or owner.share.rank > self.share.rank:
            return False
        return not self.seen.devices.isdisjoint(owner.turn.devices)

    def waits_for_any(self, owners: Iterable[Place]) -> bool:
        """Return whether waits_for() is true for at least one of the owners."""
        return any(map(self.waits_for, owners))

    def look_due_ns(self, turn: Turn, now_ns: int, due_ns: int) -> int:
        """Return when to check the owner again, less often after long work. `due_ns`: when another step is due."""
        idle_ns = turn.active_ns + self._patience_ns()
        if self.seen.in_flight:  # the work may end as estimated, and the tenant may be idle after that
            ends_ns = turn.active_ns + self.thinks.patience_ns(self.share.quantum_ns)
            idle_ns = ends_ns if ends_ns > now_ns else idle_ns
        if now_ns < idle_ns <= now_ns + IDLE_NS // 2:  # the tenant seems to be idle
            return min(idle_ns, due_ns)
        look_ns = max(idle_ns, now_ns + min(MOST_LOOK_NS, max(LOOK_NS, self.busy_ns // BUSY_PARTS)))
        return look_ns if look_ns < due_ns - SOON_NS else due_ns

    def turn_due_ns(self, turn: Turn, waiting: Iterable[Place], now_ns: int) -> int:
        """Return when the slicer next has to act on the tenant's turn or examine the tenant.

        `waiting`: the tenants that wait for a turn.
        """
        if self.is_preempted():
            return NEVER_NS
        rivals = wanting(turn, waiting)
        if turn.closing_ns:
            return self.drain_due_ns(turn, bool(rivals), now_ns)
        due, limited = self.ends_ns(turn, rivals), self.share.limited
        if limited:
            due = min(due, self._spent_ns())
        if rivals or limited:
            due = self.look_due_ns(turn, now_ns, due)
        floor_ns = turn.opened_ns + FLOOR_TURN_NS
        return min(due, floor_ns) if rivals and turn.floor and floor_ns > now_ns else due

    # A turn is charged from its first launch to the end of its last work, as far as the reports are trusted. The time
    # until a thread of the tenant or of the time slicer has woken up is not charged. Therefore a tenant with a limit of
    # 75 % does 75 % of the work that it would do alone.

    def begun_ns(self, turn: Turn) -> int:
        """Return the time from which the turn is charged."""
        begun = self.seen.begun_ns
        return min(begun, turn.opened_ns + self._span_ns()) if begun > turn.opened_ns else turn.opened_ns

    def ended_ns(self, turn: Turn, now_ns: int) -> int:
        """Return the end of the charged time of a drained turn."""
        ended = self.seen.ended_ns
        believed = self.seen.drained and 0 < turn.closing_ns <= ended <= now_ns
        return max(ended, now_ns - self._span_ns()) if believed else now_ns

    def passed_ns(self, turn: Turn) -> int:
        """Return ended_ns(), but at most the beginning of the next turn, which is charged from then on."""
        return min(max(self.seen.ended_ns, turn.closing_ns, turn.handed_ns - self._span_ns()), turn.handed_ns)

    def _span_ns(self) -> int:
        return min(SPAN_NS, self.share.quantum_ns // SPAN_PARTS)


def _was_first(rival: Place, turn: Turn) -> bool:
    """Return whether a rival would have preceded the owner, by its virtual time on the turn's devices."""
    virtual_ns = rival.virtual_ns(turn.virtual_ns.keys() & rival.seen.devices)
    return all(at_ns < turn.virtual_ns[device] for device, at_ns in virtual_ns.items())


def wanting(turn: Turn, places: Iterable[Place]) -> list[Place]:
    """Return the tenants in `places` that use a device of this turn."""
    return [place for place in places if not place.seen.devices.isdisjoint(turn.devices)]
