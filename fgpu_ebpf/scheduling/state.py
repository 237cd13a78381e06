"""The state of tenants that share devices' time, and of their turns.

`turns` uses this module, in the gatekeeper's time slicer thread; `turns` makes all decisions. Times are CLOCK_MONOTONIC
nanoseconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.scheduling import fair_queue
from fgpu_ebpf.scheduling.claim_trust import MOST_FLIGHT_NS, Trust
from fgpu_ebpf.scheduling.counters import Counts
from fgpu_ebpf.scheduling.fair_queue import Account, Leave, Share, Waiter
from fgpu_ebpf.scheduling.nested_shares import Unit, effective
from fgpu_ebpf.scheduling.observed_usage import Observed
from fgpu_ebpf.scheduling.think_times import IDLE_NS, ThinkTimes, most_patience_ns

LOOK_NS, MOST_LOOK_NS = 1_750_000, 10_000_000  # between looks at an owner that other tenants wait for
BUSY_PARTS = 16  # the time between two looks, as a part of the time that it was busy without a pause
GUESS_PARTS = 4  # the estimate of work in flight may be wrong by this part
FLOOR_TURN_NS = 4_000_000  # the length of a turn by the floor, before a higher priority may cut it
FLOOR_PARTS = fair_queue.FLOOR_NS // FLOOR_TURN_NS  # a longer turn by the floor delays the next by this multiple
START_NS = 3_000_000  # the time that a thread at the gate has to come through it
LATE_NS = 200_000  # work that should have ended this long ago may be waiting for other work
LEAD_NS = 1_000_000  # the next turn may begin this long before the end of a drain
MORE_NS = 250_000  # or this much earlier, for launches while the gate closed: another check would cost more
SOON_NS = 1_000_000  # if something else is due within this time, no extra check is made
OVERTAKEN_PARTS = 4  # the length of a turn that is due to another tenant, which was away, as a part of a quantum
LASTING_NS = 1_000_000_000  # a tenant that was busy for this long without a pause can wait as well as the others
SPAN_NS, SPAN_PARTS = 500_000, 40  # the most believed of a turn's beginning and end, and as a part of the quantum
NEVER_NS = 2**63
_OPEN, _GATED = int(abi.Gate.OPEN), int(abi.Gate.GATED)


class Seen(NamedTuple):
    """The reports of all processes of a tenant together. `devices`: those on which it has contexts.

    `drained`: nothing is in flight since the gates were last closed.
    """

    devices: frozenset[int]
    waiting: bool = False
    launches: int = 0
    in_flight: int = 0
    busy_until_ns: int = 0
    drained: bool = True
    wanted_ns: int = 0  # when a thread last wanted to launch; 0: not reported
    begun_ns: int = 0  # when a thread last came through a gate that had been closed
    ended_ns: int = 0  # when the last work in flight was seen to end
    idle_ns: int = 0  # the time with nothing in flight, between ends and launches reported since the last look


NOTHING = Seen(frozenset())


@dataclass(slots=True)
class Turn:
    """The time of one tenant on its devices; `closing_ns` 0: its gates are open.

    The tenant is charged from `begins_ns` on, which may be later than `opened_ns`: when the turn before should have
    drained. It has held the device since `since_ns`, selected by `virtual_ns`.
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
    virtual_ns: int
    closing_ns: int = 0
    deadline_ns: int = 0
    handed_ns: int = 0  # the `begins_ns` of the next turn, on some of its devices
    rested: bool = False  # closed because there was no work, while no tenant waited
    rest_ns: int = 0  # of a rest that went on at the last look: its length then
    cut: bool = False  # closed although there was more work


@dataclass(slots=True)
class Place:
    """The state of a tenant that has a share.

    `above`: the units that it is inside of, innermost first. `asked`: its share without them.
    """

    tenant: int
    share: Share
    account: Account
    seen: Seen = NOTHING
    free_on: frozenset[int] = frozenset()
    turn: Turn | None = None
    since_ns: int | None = None  # since when it wants a turn
    number: int = 0  # the number of its last turn
    late_ns: int = 0  # when its last turn passed with work in flight
    unlifted_ns: int = 0  # until then the floor owes it nothing
    pause_ns: int = 0
    pause_until_ns: int = 0
    cut: bool = False  # its last turn was cut, and it has not been looked at since
    busy_ns: int = 0  # the time of its turns since the last pause
    held_back: bool = False
    counts: Counts = field(default_factory=Counts)
    trust: Trust = field(default_factory=Trust)
    observed: Observed = field(default_factory=Observed)
    left: Leave = fair_queue.STAYED
    thinks: ThinkTimes = field(default_factory=ThinkTimes)
    asked: Share = field(default_factory=Share)
    above: tuple[Unit, ...] = ()

    def waiter(self, now_ns: int, ahead_ns: int = 0, unit_ahead_ns: int = 0) -> Waiter:
        """Return the tenant as a waiter that has wanted a turn since now at the latest.

        `ahead_ns` and `unit_ahead_ns` are charged in advance to it and to its unit.
        """
        since_ns = max(now_ns if self.since_ns is None else self.since_ns, self.unlifted_ns)
        account = self.account.charged(ahead_ns, self.share) if ahead_ns else self.account
        own_ns = account.virtual_ns
        if not self.above:
            return Waiter(self.tenant, self.share, own_ns, self.seen.devices, since_ns)
        unit, devices = self.above[-1], self.seen.devices
        unit_ns = unit.virtual_ns(devices, unit_ahead_ns)
        return Waiter(self.tenant, self.share, unit_ns, devices, since_ns, own_ns, unit.unlifted_ns(devices))

    def without_reports(self) -> Place:
        """Return a state without reports; the account and the counters stay."""
        return Place(
            self.tenant, self.share, self.account, number=self.number, counts=self.counts, trust=self.trust,
            asked=self.asked, above=self.above,
        )  # fmt: skip

    def virtual_ns(self) -> int:
        """Return the virtual time that orders its turns: its unit's if it is inside one."""
        return self.above[-1].virtual_ns(self.seen.devices) if self.above else self.account.virtual_ns

    def begins(self) -> int:
        """Record the beginning of a turn or quantum in the unit's clock; return the virtual time that orders turns."""
        if self.above:
            self.above[-1].clock_ns = max(self.above[-1].clock_ns, self.account.virtual_ns)
        return self.virtual_ns()

    def change(self, above: tuple[Unit, ...], now_ns: int) -> bool:
        """Set the units around the tenant. The time in hand stays.

        Returns whether its innermost unit is another than before, so that virtual time is another.
        """
        is_elsewhere = above[-1:] != self.above[-1:]
        account, was = self.account.at(now_ns, self.share)._replace(at_ns=now_ns), self.share
        self.above, self.share = above, effective(self.asked, above)
        more = self.share.limited and not was.limited
        account = account._replace(in_hand_ns=self.share.ample_ns) if more else account
        self.account = account._replace(virtual_ns=0) if is_elsewhere else account
        self.trust.standing = above[-1].standing if above else self.trust.standing
        self.pause_until_ns = 0
        return is_elsewhere

    def count_up(self, now_ns: int) -> None:
        """Add the time that limits have allowed since the last call."""
        self.account = self.account.at(now_ns, self.share)
        for unit in self.above:
            unit.count_up(self._devices(), now_ns)

    def join(self, clock_ns: int, now_ns: int, is_first: bool) -> None:
        """Let the tenant want a turn, without credit for idle time; `is_first`: no other of its unit does."""
        for unit in self.above:
            unit.join(self.seen.devices, clock_ns, now_ns, is_first)
        own_ns = self.above[-1].clock_ns if self.above else clock_ns
        own_ns -= self.left.credit_ns(now_ns, self.share)
        self.account = self.account.rested(now_ns, self.share).joining(own_ns)

    def charge(self, ns: int) -> None:
        """Charge the tenant and its units for `ns` of its devices' time."""
        ns = max(0, ns)
        self.account = self.account.charged(ns, self.share)
        self.counts.owned_ns += ns
        for unit in self.above:
            unit.charge(self._devices(), ns)

    def is_unit(self) -> bool:
        """Return whether other tenants lie inside this one."""
        return bool(self.above) and self.above[0].level == self.tenant

    def owned_ns(self) -> int:
        """Return the device time of the tenant and all inside it, which NVML cannot tell apart."""
        if not self.is_unit():
            return self.counts.owned_ns
        return max((self.above[0].owned_ns(device) for device in self.seen.devices), default=0)

    def lifted(self, turn: Turn, passed_ns: int) -> None:
        """Record the end of a turn by the floor: the longer it was beyond its length, the later is the next."""
        over_ns = passed_ns - turn.opened_ns - FLOOR_TURN_NS - abi.BUDGET_NS
        self.unlifted_ns = passed_ns + FLOOR_PARTS * max(0, over_ns)
        for unit in self.above[-1:]:
            unit.lifted(turn.devices, self.unlifted_ns)

    def limit_ready_ns(self) -> int:
        """Return the earliest time at which all limits allow it to begin a turn."""
        ready_ns = max(self.account.ready_ns(self.share), 0)
        return max(ready_ns, *(unit.ready_ns(self.seen.devices) for unit in self.above)) if self.above else ready_ns

    def is_spent(self) -> bool:
        """Return whether a limit leaves no time in hand."""
        if self.account.in_hand_ns <= 0 and self.share.limited:
            return True
        return bool(self.above) and any(unit.is_spent(self._devices()) for unit in self.above)

    def _devices(self) -> Collection[int]:
        return self.turn.devices if self.turn else self.seen.devices

    def _spent_ns(self) -> int:
        """Return when a turn that continues has used up the budget. The tenant must have a ceiling."""
        units = [unit.spent_ns(self._devices()) for unit in self.above if unit.share.limited]
        return min([self.account.spent_ns(self.share), *units])

    def is_open(self) -> bool:
        """Return whether it may launch on some of its devices."""
        return bool(self.free_on) or (self.turn is not None and not self.turn.closing_ns)

    def gate(self, device: int) -> int:
        """Return the word of its gate for a device."""
        if device in self.free_on:
            return _OPEN
        is_open = self.turn is not None and device in self.turn.devices and not self.turn.closing_ns
        return self.number << abi.GATE_SHIFT | _GATED | (_OPEN if is_open else 0)

    def ready_ns(self) -> int:
        """Return when it may begin a turn."""
        return max(self.limit_ready_ns(), self.pause_until_ns)

    def claim_ns(self, now_ns: int) -> int:
        """Return how long its work in flight takes from now, by its own report."""
        if not self.seen.in_flight or self.seen.busy_until_ns <= now_ns:
            return 0
        return min(self.seen.busy_until_ns - now_ns, MOST_FLIGHT_NS)

    def flight_ns(self, now_ns: int) -> int:
        """Return how long its work in flight takes from now, as far as the report is trusted."""
        claim_ns = self.claim_ns(now_ns)
        return min(claim_ns, self.trust.believed_ns(now_ns)) if claim_ns else 0

    def unpaid_ns(self, now_ns: int) -> int:
        """Return what its turn will cost beyond what was charged, if it ends together with the work in flight."""
        since_ns = max(self.turn.charged_ns, self.begun_ns(self.turn)) if self.turn else now_ns
        return max(0, now_ns - since_ns) + self.flight_ns(now_ns)

    def is_passing(self, turn: Turn, now_ns: int) -> bool:
        """Return whether its turn is so near its end that the next one may begin."""
        if turn.handed_ns:
            return True
        if not turn.closing_ns or len(turn.devices) > 1:  # kernels of a gang may be waiting for each other
            return False
        return self.flight_ns(now_ns) <= LEAD_NS + MORE_NS

    def is_preempted(self) -> bool:
        """Return whether the tenant's turn was preempted and the next tenant's turn has been granted.

        The turn will have drained by the next pass of the scheduler, and the tenant then queues again.
        """
        return self.turn is not None and self.turn.handed_ns > 0 and self.turn.cut

    def meets_ns(self, turn: Turn) -> int:
        """Return when to check if kernels of its gang wait for others behind closed gates; 0: never."""
        seen = self.seen
        may = turn.closing_ns and len(turn.devices) > 1 and seen.waiting and not seen.drained and not self.late_ns
        return seen.busy_until_ns + LATE_NS if may else 0

    def drain_due_ns(self, turn: Turn, is_wanted: bool, now_ns: int) -> int:
        """Return when to examine a closing turn: the next may begin, kernels may have to meet, or the turn is over."""
        passes_ns = self.seen.busy_until_ns - LEAD_NS if is_wanted and not turn.handed_ns else 0
        return min([turn.deadline_ns, *(at for at in (self.meets_ns(turn), passes_ns) if at > now_ns)])

    def ends_ns(self, turn: Turn, rivals: Collection[Place]) -> int:
        """Return when the turn ends for the rivals that want one now.

        It ends early for a tenant that was away when the turn began, and that would have come first.
        """
        for rival in rivals:
            if (rival.since_ns or 0) > turn.since_ns and rival.virtual_ns() < turn.virtual_ns:
                return min(turn.ends_ns, turn.since_ns + self.share.quantum_ns // OVERTAKEN_PARTS)
        if self.busy_ns < LASTING_NS or not rivals:
            return turn.ends_ns
        for rival in rivals:
            if rival.busy_ns < LASTING_NS:
                return turn.ends_ns
        return turn.ends_ns + fair_queue.longer_ns(self.share, [rival.share for rival in rivals])

    def is_idle(self, turn: Turn, now_ns: int) -> bool:
        """Return whether it has had no work for so long that its turn ends."""
        return now_ns - turn.active_ns >= self._patience_ns()

    def _patience_ns(self) -> int:
        """Return how long it may be without work; work in flight may take longer than estimated."""
        if self.seen.waiting:
            return START_NS
        if not self.seen.in_flight:
            return self.thinks.patience_ns(self.share.quantum_ns)
        guess_ns = max(0, self.seen.busy_until_ns - self.seen.wanted_ns)
        return max(IDLE_NS + guess_ns // GUESS_PARTS, most_patience_ns(self.share.quantum_ns))

    def waits_for(self, owner: Place) -> bool:
        """Return whether this tenant waits for `owner` and has no higher priority.

        False while it has late work in flight, whose end must be noticed.
        """
        if not owner.turn or owner is self or self.late_ns or owner.share.rank > self.share.rank:
            return False
        return not self.seen.devices.isdisjoint(owner.turn.devices)

    def waits_for_any(self, owners: Iterable[Place]) -> bool:
        """Return whether waits_for() is true for one of the owners."""
        return any(map(self.waits_for, owners))

    def look_due_ns(self, turn: Turn, now_ns: int, due_ns: int) -> int:
        """Return when to examine the owner again: less often the longer it was busy, because each check costs time.

        `due_ns`: when something else is due.
        """
        idle_ns = turn.active_ns + self._patience_ns()
        if self.seen.in_flight:  # perhaps it ends as estimated, and the tenant is idle after that
            ends_ns = turn.active_ns + self.thinks.patience_ns(self.share.quantum_ns)
            idle_ns = ends_ns if ends_ns > now_ns else idle_ns
        if now_ns < idle_ns <= now_ns + IDLE_NS // 2:  # it seems to be idle
            return min(idle_ns, due_ns)
        look_ns = max(idle_ns, now_ns + min(MOST_LOOK_NS, max(LOOK_NS, self.busy_ns // BUSY_PARTS)))
        return look_ns if look_ns < due_ns - SOON_NS else due_ns

    def turn_due_ns(self, turn: Turn, waiting: Iterable[Place], now_ns: int) -> int:
        """Return when something about its turn is due, if the tenants in `waiting` wait for one."""
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

    # A turn costs from the first launch to the end of the last, as far as the reports are believed. The time until a
    # thread of the tenant or the time slicer has woken up is not charged: a limit of 75 % is 75 % of the possible work.

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
        """Return ended_ns() capped at the start of the next turn, which shared the device from then on."""
        return min(max(self.seen.ended_ns, turn.closing_ns, turn.handed_ns - self._span_ns()), turn.handed_ns)

    def _span_ns(self) -> int:
        return min(SPAN_NS, self.share.quantum_ns // SPAN_PARTS)


def wanting(turn: Turn, places: Iterable[Place]) -> list[Place]:
    """Return the tenants that want a device of this turn."""
    return [place for place in places if not place.seen.devices.isdisjoint(turn.devices)]


def devices_of(places: Iterable[Place]) -> set[int]:
    """Return the devices on which these tenants have contexts."""
    found: set[int] = set()
    for place in places:
        found |= place.seen.devices
    return found


def missing(running: Iterable[Place], but: Place | None = None) -> set[int]:
    """Return devices that owners use beyond those of their turn: they get these before all other tenants."""
    found: set[int] = set()
    for place in running:
        turn = place.turn
        if turn and not turn.closing_ns and not turn.devices.issuperset(place.seen.devices) and place is not but:
            found |= place.seen.devices - turn.devices
    return found


def taken(running: Iterable[Place], now_ns: int) -> set[int]:
    """Return the devices whose turn is not near its end."""
    found: set[int] = set()
    for place in running:
        if place.turn and not place.is_passing(place.turn, now_ns):
            found |= place.turn.devices
    return found
