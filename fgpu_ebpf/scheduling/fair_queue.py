"""Selection of the next turn: proportional shares of a device's time, by virtual time.

The algorithm is start-time fair queueing (Goyal, Vin and Cheng, 1996). A turn adds its length, divided by the tenant's
weight, to the tenant's virtual time. The tenant with the lowest virtual time is next. A tenant that was idle starts at
the device's clock, the virtual time of the last turn. Such a tenant gets no credit for idle time, and keeps its debts.
A tenant that was behind the clock when its last turn ended may start as far behind for some quanta (`Leave`).

The functions have no state, do no I/O and read no clock. The functions run in the gatekeeper. The agent uses only the
class Share. Times are CLOCK_MONOTONIC nanoseconds. Limits are millionths of a device's time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

MILLION = 1_000_000
PERIOD_NS = 40_000_000  # the period of a limit; a tenant cannot save the unused time of a longer period
# A tenant that higher priorities have kept waiting for this time gets a turn by the floor. On each device, the floor
# grants at most one turn in this time.
FLOOR_NS = 100_000_000
PLAIN_WEIGHT = 100
CREDIT_QUANTA = 10  # after this many quanta without a turn, a tenant starts at the clock; also the maximum of its lag
ROUND_QUANTA = 4  # the longest round of turns, in quanta, among tenants that are never idle


class Share(NamedTuple):
    """A tenant's ceiling, weight, priority (`rank`) and length of turns. The lowest rank has the highest priority.

    `isolated`: on a concurrent device its programs run without MPS.
    """

    limit_millionths: int = MILLION
    weight: int = PLAIN_WEIGHT
    rank: int = 1
    quantum_ns: int = 20_000_000
    isolated: bool = False

    @property
    def limited(self) -> bool:
        """True if the share has a ceiling."""
        return self.limit_millionths < MILLION

    @property
    def ample_ns(self) -> int:
        """The time in hand that suffices for a whole turn, with the time that the limit adds during the turn."""
        return self.quantum_ns * (MILLION - self.limit_millionths) // MILLION

    @property
    def most_ns(self) -> int:
        """The maximum of the time in hand. A longer wait adds nothing."""
        return self.ample_ns + PERIOD_NS * self.limit_millionths // MILLION


class Account(NamedTuple):
    """A tenant's account: its virtual time, and its time in hand.

    The time in hand (`in_hand_ns`) is the device time that the limit allowed and the tenant had not used at `at_ns`. A
    value below 0 is a debt.
    """

    virtual_ns: int = 0
    in_hand_ns: int = 0
    at_ns: int = 0

    def at(self, now_ns: int, share: Share) -> Account:
        """Return the account with the time that the limit has added since `at_ns`, for a tenant that runs or waits."""
        return self._refilled(now_ns, share, share.most_ns) if share.limited else self

    def rested(self, now_ns: int, share: Share) -> Account:
        """Return the account as at() does, for a tenant that has requested no turn since `at_ns`.

        The limit adds time only up to `ample_ns`, which one turn needs.
        """
        return self._refilled(now_ns, share, max(share.ample_ns, self.in_hand_ns)) if share.limited else self

    def _refilled(self, now_ns: int, share: Share, most_ns: int) -> Account:
        more = max(0, now_ns - self.at_ns) * share.limit_millionths // MILLION
        return Account(self.virtual_ns, min(most_ns, self.in_hand_ns + more), now_ns)

    def charged(self, ns: int, share: Share) -> Account:
        """Return the account after the tenant has used `ns` of a device's time."""
        in_hand = self.in_hand_ns - ns if share.limited else self.in_hand_ns
        return Account(self.virtual_ns + ns * PLAIN_WEIGHT // share.weight, in_hand, self.at_ns)

    def joining(self, clock_ns: int) -> Account:
        """Return the account of a tenant that requests a turn after idle time. Idle time gives no credit."""
        return self._replace(virtual_ns=max(self.virtual_ns, clock_ns))

    def ready_ns(self, share: Share) -> int:
        """Return when the limit allows a turn to begin."""
        if not share.limited or self.in_hand_ns >= share.ample_ns:
            return self.at_ns
        lack = share.ample_ns - self.in_hand_ns
        return self.at_ns - (-lack * MILLION // share.limit_millionths)

    def spent_ns(self, share: Share) -> int:
        """Return when a turn that continues will have used up the time in hand."""
        left = max(0, self.in_hand_ns)
        return self.at_ns + left * MILLION // max(1, MILLION - share.limit_millionths)


class Leave(NamedTuple):
    """The end of the last turn of a tenant or unit: its time, and how far behind the clock the tenant was at that time.

    A tenant that waits for its next turn without an idle gap also stays this far behind, so a gap is no advantage.
    """

    at_ns: int = 0
    behind_ns: int = 0  # virtual time

    def credit_ns(self, now_ns: int, share: Share) -> int:
        """Return how far behind the clock the tenant may start again, in virtual time.

        The credit decreases with the time since the end of the last turn. The credit is 0 after CREDIT_QUANTA quanta.
        """
        left_ns = CREDIT_QUANTA * share.quantum_ns - (now_ns - self.at_ns)
        return max(0, min(self.behind_ns, left_ns * PLAIN_WEIGHT // share.weight))


STAYED = Leave()  # a value without credit


def opening(share: Share, now_ns: int) -> Account:
    """Return the account of a new tenant, with enough time in hand to begin a turn."""
    return Account(in_hand_ns=share.ample_ns, at_ns=now_ns)


class Waiter(NamedTuple):
    """A tenant that has waited for all of `devices` since `since_ns`, and whose limit allows a turn.

    For a tenant inside a unit (`nested_shares`), `virtual_ns` is the virtual time of the unit, `inner_ns` is the
    tenant's virtual time inside the unit, and waiting for the floor counts from `unlifted_ns` at the earliest.
    """

    tenant: int
    share: Share
    virtual_ns: int
    devices: frozenset[int]
    since_ns: int
    inner_ns: int = 0
    unlifted_ns: int = 0

    @property
    def kept_since_ns(self) -> int:
        """The time since which the tenant has waited for the floor: `unlifted_ns` at the earliest."""
        return max(self.since_ns, self.unlifted_ns)


class Floor(NamedTuple):
    """The floor of one device: the rule that grants turns to tenants that wait long because of higher priorities.

    `lifted_ns` is the time of the last such turn, and `rank` the rank of the last other turn.
    """

    lifted_ns: int = 0
    rank: int = 2


class Grant(NamedTuple):
    """A turn that begins now. `floor`: the turn prevents starvation, so no higher priority ends the turn early."""

    tenant: int
    devices: frozenset[int]
    floor: bool = False


def wanted(waiters: Iterable[Waiter]) -> set[int]:
    """Return the devices for which the tenants in `waiters` wait."""
    return {device for waiter in waiters for device in waiter.devices}


def in_order(waiters: Iterable[Waiter], floors: Mapping[int, Floor], now_ns: int) -> list[tuple[Waiter, bool]]:
    """Return the waiters in the order of their turns, with a flag: the floor lifted this waiter to the front.

    On each device, the floor lifts the tenant that has waited longest, if two conditions hold. First, tenants of a
    higher priority have kept this tenant waiting for FLOOR_NS. Second, the floor has lifted no tenant on the device for
    FLOOR_NS. Several lifted tenants (one for each device) are in the order of their waiting times. The floor
    counts all tenants inside a unit as one tenant.
    """
    by_turn = sorted(waiters, key=lambda w: (w.share.rank, w.virtual_ns, w.inner_ns, w.since_ns, w.tenant))
    lifted: set[int] = set()
    for device in {device for waiter in by_turn for device in waiter.devices}:
        there = [waiter for waiter in by_turn if device in waiter.devices]
        floor = floors.get(device, Floor())
        top = min(floor.rank, there[0].share.rank)
        if there[-1].share.rank <= top:  # the usual case: all tenants have the same priority
            continue
        kept = [w for w in there if w.share.rank > top and w.kept_since_ns + FLOOR_NS <= now_ns]
        if kept and floor.lifted_ns + FLOOR_NS <= now_ns:
            lifted.add(min(kept, key=lambda w: (w.kept_since_ns, w.since_ns, w.tenant)).tenant)
    if not lifted:
        return [(w, False) for w in by_turn]
    return [(w, True) for w in sorted((w for w in by_turn if w.tenant in lifted), key=lambda w: w.since_ns)] + [
        (w, False) for w in by_turn if w.tenant not in lifted
    ]


def next_turns(
    waiters: Iterable[Waiter], free: Collection[int], floors: Mapping[int, Floor], now_ns: int
) -> list[Grant]:
    """Return the turns that begin now. A gang, which is a tenant on several devices, gets all its devices or none.

    Free devices are kept for a gang that is next, unless a higher priority keeps the gang waiting on another device.
    """
    left, found = set(free), []
    ranks = {device: floor.rank for device, floor in floors.items()}
    for waiter, floor in in_order(waiters, floors, now_ns):
        rank, devices = waiter.share.rank, waiter.devices
        if devices <= left:
            found.append(Grant(waiter.tenant, devices, floor))
            ranks |= dict.fromkeys(devices, rank)
        elif not floor and any(ranks.get(device, rank) < rank for device in devices - left):
            continue
        left -= devices
    return found


def longer_ns(share: Share, rivals: Collection[Share]) -> int:
    """Return how much longer than its quantum a turn may last, in nanoseconds.

    The caller adds the result to a turn only if all rivals have been busy for long without a pause. Longer turns are
    fewer, so less time is lost between turns. A round, in which the tenant with the lowest weight has one turn, then
    takes ROUND_QUANTA quanta. The result is 0 if a rival has another priority, or if any tenant has a ceiling: a tenant
    with a ceiling that waits for longer than PERIOD_NS would lose the time that the ceiling adds.
    """
    if not rivals or share.limited:
        return 0
    least = weights = share.weight
    for one in rivals:
        if one.limited or one.rank != share.rank:
            return 0
        weights += one.weight
        least = one.weight if one.weight < least else least
    return share.quantum_ns * max(0, ROUND_QUANTA * least - weights) // weights


def entitlements(shares: Mapping[int, Share]) -> dict[int, int]:
    """Return the part of a device's time, in millionths, that each tenant gets while all tenants are busy.

    The time is divided by weight. The part of a tenant above its limit is divided among the tenants below their limits.
    """
    got: dict[int, int] = {}
    left, open_ = MILLION, dict(shares)
    while open_:
        weights = sum(share.weight for share in open_.values())
        part = {tenant: left * share.weight // weights for tenant, share in open_.items()}
        held = {tenant: s.limit_millionths for tenant, s in open_.items() if s.limit_millionths < part[tenant]}
        if not held:
            return got | part
        got |= held
        left -= sum(held.values())
        open_ = {tenant: share for tenant, share in open_.items() if tenant not in held}
    return got
