"""Whose turn it is: proportional share of a device's time, by virtual time.

Owns: what a turn costs, who may have one, and who comes first. Never: does I/O, keeps state, asks the time. Cannot
fail. Times are CLOCK_MONOTONIC nanoseconds, limits millionths.

As in start-time fair queueing: a turn costs its length divided by the tenant's weight, the lowest comes first, and who
comes back starts where the device's clock stands: credit for idle time does not exist, debts stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

MILLION = 1_000_000
PERIOD_NS = 40_000_000  # of a limit: what was not used for longer is gone
FLOOR_NS = 100_000_000  # lower priorities that wait get a turn as often as this, whoever is above them
PLAIN_WEIGHT = 100
ROUND_QUANTA = 4  # so long may a round of turns be, of tenants whom nobody can have to wait for


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant is to get: a ceiling, a part of contended time, and how long a turn is. Rank 0 comes first."""

    limit_millionths: int = MILLION
    weight: int = PLAIN_WEIGHT
    rank: int = 1
    quantum_ns: int = 20_000_000

    @property
    def limited(self) -> bool:
        """It has a ceiling."""
        return self.limit_millionths < MILLION

    @property
    def ample_ns(self) -> int:
        """So much in hand lasts for a whole turn, with what comes in meanwhile."""
        return self.quantum_ns * (MILLION - self.limit_millionths) // MILLION

    @property
    def most_ns(self) -> int:
        """More than this is not kept in hand, whoever keeps it waiting."""
        return self.ample_ns + PERIOD_NS * self.limit_millionths // MILLION


class Account(NamedTuple):
    """What a tenant has used: virtual time, and what its limit leaves in hand since `at_ns`; less than 0: a debt."""

    virtual_ns: int = 0
    in_hand_ns: int = 0
    at_ns: int = 0

    def at(self, now_ns: int, share: Share) -> Account:
        """With what the limit has let in since, of one who wants to run or does."""
        return self._let_in(now_ns, share, share.most_ns) if share.limited else self

    def rested(self, now_ns: int, share: Share) -> Account:
        """The same, of one who has wanted nothing since: no more than a turn needs."""
        return self._let_in(now_ns, share, max(share.ample_ns, self.in_hand_ns)) if share.limited else self

    def _let_in(self, now_ns: int, share: Share, most_ns: int) -> Account:
        more = max(0, now_ns - self.at_ns) * share.limit_millionths // MILLION
        return Account(self.virtual_ns, min(most_ns, self.in_hand_ns + more), now_ns)

    def charged(self, ns: int, share: Share) -> Account:
        """After so much of a device's time."""
        in_hand = self.in_hand_ns - ns if share.limited else self.in_hand_ns
        return Account(self.virtual_ns + ns * PLAIN_WEIGHT // share.weight, in_hand, self.at_ns)

    def joining(self, clock_ns: int) -> Account:
        """Of one who was idle: no credit for it."""
        return self._replace(virtual_ns=max(self.virtual_ns, clock_ns))

    def ripe_ns(self, share: Share) -> int:
        """When the limit lets it begin a turn."""
        if not share.limited or self.in_hand_ns >= share.ample_ns:
            return self.at_ns
        lack = share.ample_ns - self.in_hand_ns
        return self.at_ns - (-lack * MILLION // share.limit_millionths)

    def spent_ns(self, share: Share) -> int:
        """When a turn that goes on from here has used up what is in hand."""
        left = max(0, self.in_hand_ns)
        return self.at_ns + left * MILLION // max(1, MILLION - share.limit_millionths)


def opening(share: Share, now_ns: int) -> Account:
    """A new tenant's account: enough in hand to begin."""
    return Account(in_hand_ns=share.ample_ns, at_ns=now_ns)


class Waiter(NamedTuple):
    """A tenant that wants all of `devices`, since when. It may begin: its limit lets it.

    `inner_ns`: its virtual time inside a unit (`nested_shares`); `virtual_ns` is that of the unit then.
    """

    tenant: int
    share: Share
    virtual_ns: int
    devices: frozenset[int]
    since_ns: int
    inner_ns: int = 0


@dataclass(frozen=True, slots=True)
class Floor:
    """Of one device: when the floor last lifted somebody there, and the rank of the last turn that it did not lift."""

    lifted_ns: int = 0
    rank: int = 2


@dataclass(frozen=True, slots=True)
class Grant:
    """A turn that begins now. `floor`: against starvation, and not to be cut short by a higher priority."""

    tenant: int
    devices: frozenset[int]
    floor: bool = False


def wanted(waiters: Iterable[Waiter]) -> set[int]:
    """The devices that they want."""
    return {device for waiter in waiters for device in waiter.devices}


def in_order(waiters: Iterable[Waiter], floors: Mapping[int, Floor], now_ns: int) -> list[tuple[Waiter, bool]]:
    """Waiters, the first first, each with whether the floor lifted it.

    Of those whom a higher priority has kept waiting for too long, the one that has waited longest is lifted, where
    nobody was for too long. Of several that are, on devices that a gang shares, too.
    """
    by_turn = sorted(waiters, key=lambda w: (w.share.rank, w.virtual_ns, w.inner_ns, w.since_ns, w.tenant))
    lifted: set[int] = set()
    for device in {device for waiter in by_turn for device in waiter.devices}:
        there = [waiter for waiter in by_turn if device in waiter.devices]
        floor = floors.get(device, Floor())
        top = min(floor.rank, there[0].share.rank)
        kept = [w for w in there if w.share.rank > top and w.since_ns + FLOOR_NS <= now_ns]
        if kept and floor.lifted_ns + FLOOR_NS <= now_ns:
            lifted.add(min(kept, key=lambda w: (w.since_ns, w.tenant)).tenant)
    return [(w, True) for w in sorted((w for w in by_turn if w.tenant in lifted), key=lambda w: w.since_ns)] + [
        (w, False) for w in by_turn if w.tenant not in lifted
    ]


def next_turns(
    waiters: Iterable[Waiter], free: Collection[int], floors: Mapping[int, Floor], now_ns: int
) -> list[Grant]:
    """The turns that begin now. A gang has all its devices or none.

    What is free of them is kept for a gang that is next, not for one that a higher priority keeps waiting elsewhere.
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
    """By how much more than its quantum a turn may last, where all have long been busy without a pause: fewer turns
    cost less. A round takes as long as it would with quanta and the lowest weight as 1 of 4. Not where one has a
    ceiling: what that lets in while it waits for longer than PERIOD_NS would be lost."""
    shares = [share, *rivals]
    if not rivals or any(one.limited or one.rank != share.rank for one in shares):
        return 0
    weights = [one.weight for one in shares]
    return share.quantum_ns * max(0, ROUND_QUANTA * min(weights) - sum(weights)) // sum(weights)


def entitlements(shares: Mapping[int, Share]) -> dict[int, int]:
    """Millionths of a device that each of these would get if all wanted it: weights, below the limits."""
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
