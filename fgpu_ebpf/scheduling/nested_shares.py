"""Nested compute shares: a level with a share gets no additional time if inner levels have shares too.

A *unit* is the outer level with everything inside this level. The scheduler divides a device's time among units and
other tenants by their virtual times. The scheduler divides the time of a unit among the tenants inside by their own
virtual times. The ceilings of all enclosing units apply. The time that a unit has used stays charged to the unit, even
if cgroups inside the unit are created and removed.

The module runs in threads of the gatekeeper that hold the time slicer's lock. Times are in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fgpu_ebpf.scheduling.claim_trust import Standing
from fgpu_ebpf.scheduling.fair_queue import PLAIN_WEIGHT, ROUND_QUANTA, STAYED, Account, Share, entitlements


class Unit:
    """The use of each device by a unit.

    `level` is the id of the unit's cgroup. `clock_ns` is the virtual time of the last tenant inside that began a turn.
    `account`, `owned_ns` and `standing` are the values of the cgroup's own programs before the cgroup became a unit.
    """

    def __init__(
        self, level: int, share: Share, account: Account, owned_ns: int = 0, standing: Standing | None = None
    ) -> None:
        self.level, self.share, self.standing = level, share, standing or Standing()
        self.clock_ns = account.virtual_ns
        self.left = STAYED
        self._first, self._first_owned_ns = account, owned_ns
        self._accounts: dict[int, Account] = {}  # by device, because tenants inside may use several devices at a time
        self._owned_ns: dict[int, int] = {}  # by device; never decreases
        self._unlifted_ns: dict[int, int] = {}  # by device: the time from which on waiting for the floor counts

    def _of(self, device: int) -> Account:
        return self._accounts.get(device, self._first)

    def change(self, share: Share, now_ns: int) -> None:
        """Replace the share from now on. The used time stays charged."""
        if share == self.share:
            return
        for device in self._accounts:
            account = self._of(device).at(now_ns, self.share)._replace(at_ns=now_ns)
            more = share.limited and not self.share.limited
            self._accounts[device] = account._replace(in_hand_ns=share.ample_ns) if more else account
        self.share = share

    def count_up(self, devices: Iterable[int], now_ns: int) -> None:
        """Add the time that the limit has allowed since the last call."""
        for device in devices:
            self._accounts[device] = self._of(device).at(now_ns, self.share)

    def join(self, devices: Iterable[int], clock_ns: int, now_ns: int, is_first: bool) -> None:
        """Record that a tenant inside requests a turn. The unit gets no credit for idle time.

        If no other tenant inside has or requests a turn (`is_first`), the unit starts at the device's clock, less the
        credit of its last turn. Otherwise the unit may be behind the clock by at most one round of turns, because these
        turns may not be charged yet. A larger lag is not allowed: the other tenants inside may wait for another device,
        or be idle in their turns.
        """
        round_ns = ROUND_QUANTA * self.share.quantum_ns * PLAIN_WEIGHT // self.share.weight
        for device in devices:
            account = self._of(device)
            rested = account.rested(now_ns, self.share).joining(clock_ns - self.left.credit_ns(now_ns, self.share))
            self._accounts[device] = rested if is_first else account.joining(clock_ns - round_ns)

    def charge(self, devices: Iterable[int], ns: int) -> None:
        """Charge the unit for `ns` of the time of each of these devices, which a tenant inside has used."""
        for device in devices:
            self._accounts[device] = self._of(device).charged(ns, self.share)
            self._owned_ns[device] = self.owned_ns(device) + ns

    def owned_ns(self, device: int) -> int:
        """Return the device time of the tenants inside, and of the level's own earlier programs."""
        return self._owned_ns.get(device, self._first_owned_ns)

    def lifted(self, devices: Iterable[int], until_ns: int) -> None:
        """Record the end of a turn that the floor (`fair_queue.Floor`) gave to a tenant inside.

        Time for which any tenant inside waits for the floor counts only from `until_ns` on.
        """
        for device in devices:
            self._unlifted_ns[device] = max(until_ns, self._unlifted_ns.get(device, 0))

    def unlifted_ns(self, devices: Iterable[int]) -> int:
        """Return the earliest time since which a tenant inside can count as waiting for the floor on these devices."""
        return max((self._unlifted_ns.get(device, 0) for device in devices), default=0)

    def virtual_ns(self, devices: Iterable[int], ahead_ns: int = 0) -> int:
        """Return the virtual time on these devices, as if the unit had used `ahead_ns` more device time."""
        return max([self._of(device).charged(ahead_ns, self.share).virtual_ns for device in devices], default=0)

    def ready_ns(self, devices: Iterable[int]) -> int:
        """Return when the limit allows a tenant inside to begin a turn."""
        return max((self._of(device).ready_ns(self.share) for device in devices), default=0)

    def spent_ns(self, devices: Iterable[int]) -> int:
        """Return when a turn that continues will have used up the time in hand. The unit must have a ceiling."""
        return min((self._of(device).spent_ns(self.share) for device in devices), default=0)

    def is_spent(self, devices: Iterable[int]) -> bool:
        """Return whether the limit leaves no time in hand."""
        return self.share.limited and any(self._of(device).in_hand_ns <= 0 for device in devices)


def effective(share: Share, above: Sequence[Unit]) -> Share:
    """Return the share of a tenant inside units, with the lowest ceiling and priority of the tenant and the units."""
    limits, ranks = [unit.share.limit_millionths for unit in above], [unit.share.rank for unit in above]
    return share._replace(limit_millionths=min([share.limit_millionths, *limits]), rank=max([share.rank, *ranks]))


def entitled(shares: Mapping[int, Share], tops: Mapping[int, Unit]) -> dict[int, int]:
    """Return each tenant's share of a device, in millionths, when all tenants are active.

    Args:
        shares: the share of each tenant.
        tops: the outermost unit of each tenant that is inside a unit.
    """
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
