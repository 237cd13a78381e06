"""Choice of the next turn: proportional shares of a device's time, by virtual time.

As in start-time fair queueing (Goyal, Vin and Cheng, 1996): a turn costs its length divided by the tenant's weight, and
the tenant with the lowest virtual time is next. A tenant that was idle starts at the device's clock: it gets no credit
for idle time, and debts stay. What it was behind when it left stays for some quanta (`Leave`).

The module has functions and values without state, I/O or clock. `turns` uses it in the gatekeeper's time slicer thread,
and the agent uses it for shares. Times are CLOCK_MONOTONIC nanoseconds, limits are millionths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

MILLION = 1_000_000
PERIOD_NS = 40_000_000  # of a limit: time that was not used for longer is lost
FLOOR_NS = 100_000_000  # a waiting tenant of a lower priority gets a turn at least this often
PLAIN_WEIGHT = 100
CREDIT_QUANTA = 10  # how long a tenant's lag is kept while it is away, and the maximum of the lag
ROUND_QUANTA = 4  # the longest round of turns, in quanta, of tenants that only wait for each other


@dataclass(frozen=True, slots=True)
class Share:
    """A tenant's ceiling, its part of contended time, and the length of its turns. The lowest rank goes first."""

    limit_millionths: int = MILLION
    weight: int = PLAIN_WEIGHT
    rank: int = 1
    quantum_ns: int = 20_000_000

    @property
    def limited(self) -> bool:
        """True if there is a ceiling."""
        return self.limit_millionths < MILLION

    @property
    def ample_ns(self) -> int:
        """The time in hand that, with what the limit adds during it, lasts for a whole turn."""
        return self.quantum_ns * (MILLION - self.limit_millionths) // MILLION

    @property
    def most_ns(self) -> int:
        """The most time in hand, however long the tenant has waited."""
        return self.ample_ns + PERIOD_NS * self.limit_millionths // MILLION


class Account(NamedTuple):
    """A tenant's virtual time, and the time that its limit had left at `at_ns`; below 0: a debt."""

    virtual_ns: int = 0
    in_hand_ns: int = 0
    at_ns: int = 0

    def at(self, now_ns: int, share: Share) -> Account:
        """Return the account with the time that the limit has added since, for a tenant that runs or wants to."""
        return self._refilled(now_ns, share, share.most_ns) if share.limited else self

    def rested(self, now_ns: int, share: Share) -> Account:
        """Return the account as at() does, for a tenant that wanted no turn since: no more than a turn needs."""
        return self._refilled(now_ns, share, max(share.ample_ns, self.in_hand_ns)) if share.limited else self

    def _refilled(self, now_ns: int, share: Share, most_ns: int) -> Account:
        more = max(0, now_ns - self.at_ns) * share.limit_millionths // MILLION
        return Account(self.virtual_ns, min(most_ns, self.in_hand_ns + more), now_ns)

    def charged(self, ns: int, share: Share) -> Account:
        """Return the account after `ns` of a device's time."""
        in_hand = self.in_hand_ns - ns if share.limited else self.in_hand_ns
        return Account(self.virtual_ns + ns * PLAIN_WEIGHT // share.weight, in_hand, self.at_ns)

    def joining(self, clock_ns: int) -> Account:
        """Return the account of a tenant that was idle: without credit for that time."""
        return self._replace(virtual_ns=max(self.virtual_ns, clock_ns))

    def ready_ns(self, share: Share) -> int:
        """Return when the limit allows a turn to begin."""
        if not share.limited or self.in_hand_ns >= share.ample_ns:
            return self.at_ns
        lack = share.ample_ns - self.in_hand_ns
        return self.at_ns - (-lack * MILLION // share.limit_millionths)

    def spent_ns(self, share: Share) -> int:
        """Return when a turn that continues will have used up the budget."""
        left = max(0, self.in_hand_ns)
        return self.at_ns + left * MILLION // max(1, MILLION - share.limit_millionths)


class Leave(NamedTuple):
    """The end of a tenant's last turn, or of the last inside a unit: when, and how far behind the clock it was then.

    A tenant that waited instead would stay as far behind, so leaving gains nothing.
    """

    at_ns: int = 0
    behind_ns: int = 0  # virtual time

    def credit_ns(self, now_ns: int, share: Share) -> int:
        """Return how far behind the clock the tenant may start again, in virtual time.

        The time that it was away is taken off: 0 after CREDIT_QUANTA.
        """
        left_ns = CREDIT_QUANTA * share.quantum_ns - (now_ns - self.at_ns)
        return max(0, min(self.behind_ns, left_ns * PLAIN_WEIGHT // share.weight))


STAYED = Leave()  # gives no credit


def opening(share: Share, now_ns: int) -> Account:
    """Return a new tenant's account, with enough time in hand to begin."""
    return Account(in_hand_ns=share.ample_ns, at_ns=now_ns)


class Waiter(NamedTuple):
    """A tenant that waits for all of `devices` since `since_ns`, and whose limit allows it to begin.

    `inner_ns`: its virtual time inside a unit (`nested_shares`); `virtual_ns` is the unit's then. Until `unlifted_ns`
    the floor owes its unit nothing.
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
        """Time since which it has waited for the floor: later if its unit got a turn by the floor meanwhile."""
        return max(self.since_ns, self.unlifted_ns)


@dataclass(frozen=True, slots=True)
class Floor:
    """The floor of one device: when it last lifted a tenant, and the rank of the last turn without it."""

    lifted_ns: int = 0
    rank: int = 2


@dataclass(frozen=True, slots=True)
class Grant:
    """A turn that begins now. `floor`: it prevents starvation, so a higher priority does not cut it short."""

    tenant: int
    devices: frozenset[int]
    floor: bool = False


def wanted(waiters: Iterable[Waiter]) -> set[int]:
    """Return the devices that these tenants wait for."""
    return {device for waiter in waiters for device in waiter.devices}


def in_order(waiters: Iterable[Waiter], floors: Mapping[int, Floor], now_ns: int) -> list[tuple[Waiter, bool]]:
    """Return the waiters in the order of their turns, each with whether the floor lifted it.

    If higher priorities have kept tenants waiting for FLOOR_NS, and the floor has lifted none for as long, it lifts the
    one that has waited longest. If it lifts several, on devices that a gang shares, they go by waiting time too.
    Tenants inside a unit wait as one.
    """
    by_turn = sorted(waiters, key=lambda w: (w.share.rank, w.virtual_ns, w.inner_ns, w.since_ns, w.tenant))
    lifted: set[int] = set()
    for device in {device for waiter in by_turn for device in waiter.devices}:
        there = [waiter for waiter in by_turn if device in waiter.devices]
        floor = floors.get(device, Floor())
        top = min(floor.rank, there[0].share.rank)
        if there[-1].share.rank <= top:  # usually all have one priority
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
    """Return the turns that begin now. A gang gets all its devices or none.

    Free devices are kept for a gang that is next, unless a higher priority keeps it waiting on another device.
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

    A longer turn is granted when all rivals have been busy for long without a pause: fewer turns cost less. A round
    takes as long as it would with quanta if the lowest weight were 1 of 4. The result is 0 if a tenant has another
    priority, or a ceiling: time that the ceiling adds while the tenant waits for longer than PERIOD_NS would be lost.
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
    """Return the millionths of a device that each tenant gets if all want it: by weight, below the limits."""
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
