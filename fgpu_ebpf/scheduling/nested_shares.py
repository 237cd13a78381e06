"""Nested compute shares: a level with a share gets no additional time if inner levels have shares too.

A *unit* is the outer level with everything inside this level. The scheduler divides a device's time among units and
other tenants by their virtual times. The scheduler divides the time of a unit among the tenants inside by their own
virtual times. The ceilings of all enclosing units apply. The time that a unit has used stays charged to the unit, even
if cgroups inside the unit are created and removed.

The module runs in threads of the gatekeeper that hold the time slicer's lock. Times are in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from fgpu_ebpf.scheduling.accounts import Accounts
from fgpu_ebpf.scheduling.claim_trust import Standing
from fgpu_ebpf.scheduling.fair_queue import PLAIN_WEIGHT, ROUND_QUANTA, Share, entitlements


class Unit(Accounts):
    """The use of each device by a unit, with all tenants inside.

    `level` is the id of the unit's cgroup. `before` is the use by the cgroup's own programs before the cgroup became a
    unit: the accounts, the owned time by device, and the standing. `clocks`: by device, the virtual time of the last
    tenant inside that began a turn.
    """

    def __init__(
        self, level: int, share: Share, now_ns: int, before: tuple[Accounts, dict[int, int], Standing] | None = None
    ) -> None:
        super().__init__(share, now_ns)
        self.level, self.standing = level, before[2] if before else Standing()
        self.clocks: dict[int, int] = {}
        self._owned_ns = before[1] if before else {}  # by device; never decreases
        self._unlifted_ns: dict[int, int] = {}  # by device: the time from which on waiting for the floor counts
        if before:
            self.copy(before[0])

    def join_inside(self, clocks: Mapping[int, int], now_ns: int, is_first: bool) -> None:
        """Record that a tenant inside requests a turn. The unit gets no credit for idle time.

        If no other tenant inside has or requests a turn (`is_first`), the unit joins as a tenant does. Otherwise the
        unit may be behind the clock by at most one round of turns, because these turns may not be charged yet. A larger
        lag is not allowed: the other tenants inside may wait for another device, or be idle in their turns.
        """
        if is_first:
            self.join(clocks, now_ns)
            return
        round_ns = ROUND_QUANTA * self.share.quantum_ns * PLAIN_WEIGHT // self.share.weight
        for device, clock_ns in clocks.items():
            self.move_up(device, clock_ns - round_ns)

    def charge(self, devices: Collection[int], ns: int) -> None:
        """Charge the unit for `ns` of the time of each of these devices, which a tenant inside has used."""
        super().charge(devices, ns)
        for device in devices:
            self._owned_ns[device] = self.owned_ns(device) + ns

    def owned_ns(self, device: int) -> int:
        """Return the device time of the tenants inside, and of the level's own earlier programs."""
        return self._owned_ns.get(device, 0)

    def lifted(self, devices: Iterable[int], until_ns: int) -> None:
        """Record the end of a turn that the floor (`fair_queue.Floor`) gave to a tenant inside.

        Time for which any tenant inside waits for the floor counts only from `until_ns` on.
        """
        for device in devices:
            self._unlifted_ns[device] = max(until_ns, self._unlifted_ns.get(device, 0))

    def unlifted_ns(self, devices: Iterable[int]) -> int:
        """Return the earliest time since which a tenant inside can count as waiting for the floor on these devices."""
        return max((self._unlifted_ns.get(device, 0) for device in devices), default=0)


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
