"""Shares inside a share: a level gets no more time for levels with shares that lie inside it.

A *unit* is such a level, with all that lies inside. Devices' time is divided among units and other tenants by their
own virtual time, and a unit's part among the tenants inside by theirs. Each ceiling on the way holds. What a unit has
used stays with it, whichever cgroups are made and removed inside.

Owns: what units have used, on each device. Never: decides which turn comes next (`turns` does), or asks the time.
Cannot fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fgpu_ebpf.scheduler import PLAIN_WEIGHT, ROUND_QUANTA, Account, Share, entitlements


class Unit:
    """`level`: its cgroup's id. `clock_ns`: the virtual time of the last tenant inside that began a turn."""

    def __init__(self, level: int, share: Share, account: Account) -> None:
        self.level, self.share = level, share
        self.clock_ns = account.virtual_ns
        self._first = account
        self._accounts: dict[int, Account] = {}  # by device: tenants inside may use several at a time

    def _of(self, device: int) -> Account:
        return self._accounts.get(device, self._first)

    def change(self, share: Share, now_ns: int) -> None:
        """It has another share from now on; what it has used stays."""
        if share == self.share:
            return
        for device in self._accounts:
            account = self._of(device).at(now_ns, self.share)._replace(at_ns=now_ns)
            more = share.limited and not self.share.limited
            self._accounts[device] = account._replace(in_hand_ns=share.ample_ns) if more else account
        self.share = share

    def count_up(self, devices: Iterable[int], now_ns: int) -> None:
        """With what its limit has let in since the last time."""
        for device in devices:
            self._accounts[device] = self._of(device).at(now_ns, self.share)

    def join(self, devices: Iterable[int], clock_ns: int, now_ns: int, is_first: bool) -> None:
        """One inside wants a turn; `is_first`: no other has wanted or had one. No credit for idle time.

        Where others do, the unit may be behind by a round of turns that are not charged yet, and no more: what the
        others want may be another device, or a turn in which they do nothing.
        """
        round_ns = ROUND_QUANTA * self.share.quantum_ns * PLAIN_WEIGHT // self.share.weight
        for device in devices:
            account = self._of(device)
            rested = account.rested(now_ns, self.share).joining(clock_ns)
            self._accounts[device] = rested if is_first else account.joining(clock_ns - round_ns)

    def charge(self, devices: Iterable[int], ns: int) -> None:
        """One inside has had so much of the time of each of these devices."""
        for device in devices:
            self._accounts[device] = self._of(device).charged(ns, self.share)

    def virtual_ns(self, devices: Iterable[int], ahead_ns: int = 0) -> int:
        """Its virtual time on these devices, with so much more of their time."""
        return max((self._of(device).charged(ahead_ns, self.share).virtual_ns for device in devices), default=0)

    def ripe_ns(self, devices: Iterable[int]) -> int:
        """When its limit lets one inside begin a turn."""
        return max((self._of(device).ripe_ns(self.share) for device in devices), default=0)

    def spent_ns(self, devices: Iterable[int]) -> int:
        """When a turn that goes on has used up what its limit leaves in hand. Only of a unit with a ceiling."""
        return min((self._of(device).spent_ns(self.share) for device in devices), default=0)

    def is_spent(self, devices: Iterable[int]) -> bool:
        """Its limit leaves nothing in hand."""
        return self.share.limited and any(self._of(device).in_hand_ns <= 0 for device in devices)


def effective(share: Share, above: Sequence[Unit]) -> Share:
    """The share of a tenant inside units: the lowest ceiling, the lowest priority."""
    limits, ranks = [unit.share.limit_millionths for unit in above], [unit.share.rank for unit in above]
    return replace(share, limit_millionths=min([share.limit_millionths, *limits]), rank=max([share.rank, *ranks]))


def entitled(shares: Mapping[int, Share], tops: Mapping[int, Unit]) -> dict[int, int]:
    """Millionths of a device that each tenant would get if all wanted it. `tops`: the unit of a tenant inside one."""
    inside: dict[int, dict[int, Share]] = {}
    for tenant, share in shares.items():
        level = tops[tenant].level if tenant in tops else tenant
        inside.setdefault(level, {})[tenant] = share
    units = {unit.level: unit.share for unit in tops.values()}
    parts = entitlements({level: units.get(level) or shares[level] for level in inside})
    found: dict[int, int] = {}
    for level, members in inside.items():
        weights = sum(share.weight for share in members.values())
        for tenant, share in members.items():
            found[tenant] = min(parts[level] * share.weight // weights, share.limit_millionths)
    return found
