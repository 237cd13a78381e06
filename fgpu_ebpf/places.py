"""What is known of tenants that share devices' time, and of their turns.

Owns: these records, nothing else. Never: decides (`turns` does). Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fgpu_ebpf import pages, scheduler
from fgpu_ebpf.nested_shares import Unit, effective
from fgpu_ebpf.observed import Observed
from fgpu_ebpf.scheduler import Account, Share, Waiter
from fgpu_ebpf.trust import MOST_FLIGHT_NS, Trust

BUCKETS_NS = tuple(int(ms * 1e6) for ms in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 512))
LOOK_NS, MOST_LOOK_NS = 1_750_000, 10_000_000  # between looks at an owner that others wait for
BUSY_PARTS = 16  # of the time that it was busy without a pause, between two looks
IDLE_NS = 500_000  # without anything to run for as long, it gives way
GUESS_PARTS = 4  # such a part of how long work in flight should take may be wrong
FLOOR_TURN_NS = 4_000_000  # what the floor lifts a tenant for, before a higher priority may come again
START_NS = 3_000_000  # what a thread at the gate has to come through it
LATE_NS = 200_000  # so long after work in flight should have ended it may be waiting for other work
LEAD_NS = 1_000_000  # so near the end of a drain the next turn may begin
MORE_NS = 250_000  # or a little earlier, of what was launched while the gate closed: to look again costs more
SOON_NS = 1_000_000  # before something else is due nobody is looked at
LASTING_NS = 1_000_000_000  # busy for as long without a pause, it is no more impatient than others that are
SPAN_NS, SPAN_PARTS = 500_000, 40  # believed of a turn's beginning and end: so long, or such a part of the quantum
NEVER_NS = 2**63
_OPEN, _GATED = int(pages.Gate.OPEN), int(pages.Gate.GATED)


class Seen(NamedTuple):
    """What a tenant's processes say of themselves, all together. `devices`: those that it has contexts on.

    `drained`: nothing is in flight since its gates were last closed.
    """

    devices: frozenset[int]
    waiting: bool = False
    launches: int = 0
    in_flight: int = 0
    busy_until_ns: int = 0
    drained: bool = True
    wanted_ns: int = 0  # when one last wanted to launch; 0: it does not say
    begun_ns: int = 0  # when one last came through a gate that had been closed
    ended_ns: int = 0  # when the last of what was in flight was seen to end
    idle_ns: int = 0  # with nothing in flight, between ends and launches that were told since the last look


NOTHING = Seen(frozenset())


@dataclass(slots=True)
class Turn:
    """One tenant's time on its devices; `closing_ns` 0: its gates are open.

    It is charged from `begins_ns` on, which may come after `opened_ns`: when the turn before should have drained.
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
    closing_ns: int = 0
    deadline_ns: int = 0
    handed_ns: int = 0  # the `begins_ns` of the next one, on some of its devices
    rested: bool = False  # closed for want of work, with nobody waiting
    rest_ns: int = 0  # until it was last looked at, of a rest that went on then
    cut: bool = False  # closed though there was more to do


@dataclass(slots=True)
class Counts:
    """Ever growing."""

    owned_ns: int = 0
    waits: int = 0
    wait_ns: int = 0
    overruns: int = 0
    switches: int = 0
    throttled: int = 0


@dataclass(slots=True)
class DeviceCounts:
    """Ever growing, of one device. `drains`: how many took up to each of BUCKETS_NS, and longer."""

    switches: int = 0
    overruns: int = 0
    drain_ns: int = 0
    drains: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_NS) + 1))

    def add(self, ns: int, overrun: bool) -> None:
        """A turn that has ended."""
        self.drains[sum(ns > bucket for bucket in BUCKETS_NS)] += 1
        self.drain_ns += ns
        self.overruns += overrun


@dataclass(slots=True)
class Place:
    """A tenant that has a share. `above`: the units that it is inside of, innermost first; `asked`: its share without
    them.
    """

    tenant: int
    share: Share
    account: Account
    seen: Seen = NOTHING
    free_on: frozenset[int] = frozenset()
    turn: Turn | None = None
    since_ns: int | None = None  # wants a turn
    number: int = 0  # of its last turn
    late_ns: int = 0  # when its last turn passed with work in flight
    unlifted_ns: int = 0  # until then the floor owes it nothing
    shy_ns: int = 0
    shy_until_ns: int = 0
    cut: bool = False  # its last turn was, and it has not been looked at since
    busy_ns: int = 0  # of its turns, without a pause in them
    held_back: bool = False
    counts: Counts = field(default_factory=Counts)
    trust: Trust = field(default_factory=Trust)
    observed: Observed = field(default_factory=Observed)
    asked: Share = field(default_factory=Share)
    above: tuple[Unit, ...] = ()

    def waiter(self, now_ns: int, ahead_ns: int = 0, unit_ahead_ns: int = 0) -> Waiter:
        """As the scheduler sees it, after so much more of the device's time for it and for its unit; what wants nothing
        yet wants it now.
        """
        since_ns = max(now_ns if self.since_ns is None else self.since_ns, self.unlifted_ns)
        own_ns = self.account.charged(ahead_ns, self.share).virtual_ns
        if not self.above:
            return Waiter(self.tenant, self.share, own_ns, self.seen.devices, since_ns)
        unit_ns = self.above[-1].virtual_ns(self.seen.devices, unit_ahead_ns)
        return Waiter(self.tenant, self.share, unit_ns, self.seen.devices, since_ns, own_ns)

    def afresh(self) -> Place:
        """As one of which nothing was heard yet; what it has used stays, and what is counted."""
        return Place(
            self.tenant, self.share, self.account, number=self.number, counts=self.counts, trust=self.trust,
            asked=self.asked, above=self.above,
        )  # fmt: skip

    def virtual_ns(self) -> int:
        """By which its turns come: its unit's, if it is inside one."""
        return self.above[-1].virtual_ns(self.seen.devices) if self.above else self.account.virtual_ns

    def begins(self) -> int:
        """Its virtual time, of a turn or another quantum that begins; what joins in its unit starts at its own."""
        if self.above:
            self.above[-1].clock_ns = max(self.above[-1].clock_ns, self.account.virtual_ns)
        return self.virtual_ns()

    def change(self, above: tuple[Unit, ...], now_ns: int) -> bool:
        """These units are around it now, and its own share is as asked. What its limit leaves in hand stays.

        True: it is in another unit than before, or in none any more, where virtual time is another.
        """
        is_elsewhere = above[-1:] != self.above[-1:]
        account, was = self.account.at(now_ns, self.share)._replace(at_ns=now_ns), self.share
        self.above, self.share = above, effective(self.asked, above)
        more = self.share.limited and not was.limited
        account = account._replace(in_hand_ns=self.share.ample_ns) if more else account
        self.account = account._replace(virtual_ns=0) if is_elsewhere else account
        self.shy_until_ns = 0
        return is_elsewhere

    def count_up(self, now_ns: int) -> None:
        """With what limits have let in since the last time."""
        self.account = self.account.at(now_ns, self.share)
        for unit in self.above:
            unit.count_up(self._devices(), now_ns)

    def join(self, clock_ns: int, now_ns: int, is_first: bool) -> None:
        """It wants a turn; `is_first`: nothing else of its unit has wanted or had one. No credit for idle time."""
        for unit in self.above:
            unit.join(self.seen.devices, clock_ns, now_ns, is_first)
        own_ns = self.above[-1].clock_ns if self.above else clock_ns
        self.account = self.account.rested(now_ns, self.share).joining(own_ns)

    def charge(self, ns: int) -> None:
        """It has had so much of its devices' time."""
        ns = max(0, ns)
        self.account = self.account.charged(ns, self.share)
        self.counts.owned_ns += ns
        for unit in self.above:
            unit.charge(self._devices(), ns)

    def let_in_ns(self) -> int:
        """When its limit, and those around it, let it begin a turn."""
        return max(self.account.ripe_ns(self.share), *(unit.ripe_ns(self.seen.devices) for unit in self.above), 0)

    def is_spent(self) -> bool:
        """A limit leaves nothing in hand."""
        own = self.share.limited and self.account.in_hand_ns <= 0
        return own or any(unit.is_spent(self._devices()) for unit in self.above)

    def _devices(self) -> Collection[int]:
        return self.turn.devices if self.turn else self.seen.devices

    def _spent_ns(self) -> int:
        """When what limits leave in hand is used up, of a turn that goes on. Only of a tenant with a ceiling."""
        units = [unit.spent_ns(self._devices()) for unit in self.above if unit.share.limited]
        return min([self.account.spent_ns(self.share), *units])

    def is_open(self) -> bool:
        """It may launch, on some of its devices."""
        return bool(self.free_on) or (self.turn is not None and not self.turn.closing_ns)

    def gate(self, device: int) -> int:
        """What its gate there says."""
        if device in self.free_on:
            return _OPEN
        is_open = self.turn is not None and device in self.turn.devices and not self.turn.closing_ns
        return self.number << pages.GATE_SHIFT | _GATED | (_OPEN if is_open else 0)

    def ripe_ns(self) -> int:
        """When it may begin a turn."""
        return max(self.let_in_ns(), self.shy_until_ns)

    def claim_ns(self, now_ns: int) -> int:
        """How long its work in flight takes from now, it says."""
        return min(max(0, self.seen.busy_until_ns - now_ns), MOST_FLIGHT_NS) if self.seen.in_flight else 0

    def flight_ns(self, now_ns: int) -> int:
        """The same, as far as it is believed."""
        return min(self.claim_ns(now_ns), self.trust.believed_ns(now_ns))

    def unpaid_ns(self, now_ns: int) -> int:
        """What its turn will cost beside what it was charged so far, if it ends when its work in flight does."""
        since_ns = max(self.turn.charged_ns, self.begun_ns(self.turn)) if self.turn else now_ns
        return max(0, now_ns - since_ns) + self.flight_ns(now_ns)

    def is_passing(self, turn: Turn, now_ns: int) -> bool:
        """Its turn is so near its end that the next one may begin."""
        if turn.handed_ns:
            return True
        is_gang = len(turn.devices) > 1  # whose kernels may be waiting for each other
        return turn.closing_ns > 0 and not is_gang and self.flight_ns(now_ns) <= LEAD_NS + MORE_NS

    def comes_back(self) -> bool:
        """Its turn was cut and has passed to another: it will have drained, and want to go on, when it is looked at."""
        return self.turn is not None and self.turn.handed_ns > 0 and self.turn.cut

    def meets_ns(self, turn: Turn) -> int:
        """When to see whether kernels of its gang wait for others that wait at closed gates; 0: never."""
        seen = self.seen
        may = turn.closing_ns and len(turn.devices) > 1 and seen.waiting and not seen.drained and not self.late_ns
        return seen.busy_until_ns + LATE_NS if may else 0

    def drain_due_ns(self, turn: Turn, is_wanted: bool, now_ns: int) -> int:
        """When to look at a turn that is closing: the next may begin, kernels may have to meet, or it is over."""
        passes_ns = self.seen.busy_until_ns - LEAD_NS if is_wanted and not turn.handed_ns else 0
        return min([turn.deadline_ns, *(at for at in (self.meets_ns(turn), passes_ns) if at > now_ns)])

    def ends_ns(self, turn: Turn, rivals: Collection[Place]) -> int:
        """When it is another's turn, of those who want one now."""
        if self.busy_ns < LASTING_NS or any(rival.busy_ns < LASTING_NS for rival in rivals):
            return turn.ends_ns
        return turn.ends_ns + scheduler.longer_ns(self.share, [rival.share for rival in rivals])

    def is_idle(self, turn: Turn, now_ns: int) -> bool:
        """It has had nothing to run for so long that it gives way."""
        return now_ns - turn.active_ns >= self._patience_ns()

    def _patience_ns(self) -> int:
        """What is in flight may take a little longer than it was thought to."""
        if self.seen.waiting:
            return START_NS
        guess_ns = max(0, self.seen.busy_until_ns - self.seen.wanted_ns) if self.seen.in_flight else 0
        return IDLE_NS + guess_ns // GUESS_PARTS

    def waits_for(self, owner: Place) -> bool:
        """It has to, and does not outrank the owner. (Of what it left in flight one wants to hear the end.)"""
        owned = owner.turn.devices if owner.turn and owner is not self else ()
        return owner.share.rank <= self.share.rank and not self.late_ns and not self.seen.devices.isdisjoint(owned)

    def look_due_ns(self, turn: Turn, now_ns: int, due_ns: int) -> int:
        """When to look at the owner again: whoever was busy for long is likely to stay so, and a look has its price.

        `due_ns`: when something else is due.
        """
        idle_ns = turn.active_ns + self._patience_ns()
        if now_ns < idle_ns <= now_ns + IDLE_NS // 2:  # it seems to be idle
            return min(idle_ns, due_ns)
        look_ns = max(idle_ns, now_ns + min(MOST_LOOK_NS, max(LOOK_NS, self.busy_ns // BUSY_PARTS)))
        return look_ns if look_ns < due_ns - SOON_NS else due_ns

    def turn_due_ns(self, turn: Turn, waiting: Iterable[Place], now_ns: int) -> int:
        """When something about its turn is due, if these wait for one."""
        if self.comes_back():
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

    # A turn costs from the first launch to the end of the last, as far as the tenant is to be believed: what passes
    # until a thread has woken up, and until we have, is nobody's, and a limit of 75 % is 75 % of what it could do.

    def begun_ns(self, turn: Turn) -> int:
        """Since when the turn costs something."""
        begun = self.seen.begun_ns
        return min(begun, turn.opened_ns + self._span_ns()) if begun > turn.opened_ns else turn.opened_ns

    def ended_ns(self, turn: Turn, now_ns: int) -> int:
        """Until when it does, of a turn that has drained."""
        ended = self.seen.ended_ns
        believed = self.seen.drained and 0 < turn.closing_ns <= ended <= now_ns
        return max(ended, now_ns - self._span_ns()) if believed else now_ns

    def passed_ns(self, turn: Turn) -> int:
        """The same, of one that another has followed: since that should have begun it has had to share."""
        return min(max(self.seen.ended_ns, turn.closing_ns, turn.handed_ns - self._span_ns()), turn.handed_ns)

    def _span_ns(self) -> int:
        return min(SPAN_NS, self.share.quantum_ns // SPAN_PARTS)


def wanting(turn: Turn, places: Iterable[Place]) -> list[Place]:
    """Those that want a device which that turn is on."""
    return [place for place in places if not place.seen.devices.isdisjoint(turn.devices)]


def missing(running: Iterable[Place], but: Place | None = None) -> set[int]:
    """Devices that owners have begun to use beside those of their turn: these come next, before all others."""
    return {
        device
        for place in running
        if place is not but and place.turn and not place.turn.closing_ns
        for device in place.seen.devices - place.turn.devices
    }


def taken(running: Iterable[Place], now_ns: int) -> set[int]:
    """Devices of which the turn is not near its end."""
    return {
        device
        for place in running
        if place.turn and not place.is_passing(place.turn, now_ns)
        for device in place.turn.devices
    }
