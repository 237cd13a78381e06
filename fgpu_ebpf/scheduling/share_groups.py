"""All units of a host: levels with a share that contain levels with shares (`nested_shares`).

A unit exists as long as its level has a share, so its used time is kept after the cgroups inside are removed. The
module runs in threads of the gatekeeper that hold the time slicer's lock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from fgpu_ebpf.scheduling.fair_queue import Leave, Share, Waiter
from fgpu_ebpf.scheduling.nested_shares import Unit, effective
from fgpu_ebpf.scheduling.state import Place

Inside = tuple[Place, tuple[Unit, ...]]


class Units:
    """All units, by level."""

    def __init__(self) -> None:
        self._units: dict[int, Unit] = {}

    def nest(self, places: Mapping[int, Place], tenant: int, levels: Sequence[int]) -> Iterator[Inside]:
        """Place a tenant inside these levels, innermost first. Yield each tenant whose units change, and the new units.

        A level that becomes a unit starts with the time that its own programs have used.
        """
        for number, level in enumerate(levels):
            if level not in self._units:
                place = places[level]
                before = place.account, place.counts.owned_ns, place.trust.standing
                self._units[level] = Unit(level, place.asked, *before)
                yield from self.nest(places, level, levels[number + 1 :])
        above = tuple(unit for level in (tenant, *levels) if (unit := self._units.get(level)))
        if above != places[tenant].above:
            yield places[tenant], above

    def share_out(self, shares: Mapping[int, Share], now_ns: int) -> None:
        """Set the shares of all levels, and remove the units of levels without a share."""
        self._units = {level: unit for level, unit in self._units.items() if level in shares}
        for level, unit in self._units.items():
            unit.change(shares[level], now_ns)

    def of(self, above: Sequence[Unit]) -> tuple[Unit, ...]:
        """Return the units in `above` that still exist."""
        return tuple(unit for unit in above if self._units.get(unit.level) is unit)

    def differs(self, place: Place, share: Share) -> bool:
        """Return whether a tenant's share, the units around the tenant, or the shares of these units have changed."""
        above = self.of(place.above)
        return place.asked != share or above != place.above or place.share != effective(share, above)


def first_inside(place: Place, others: Iterable[Place]) -> bool:
    """Return whether no tenant of the same unit is among `others`."""
    unit = place.above[-1] if place.above else None
    return unit is None or not any(other is not place and unit in other.above for other in others)


def leave(place: Place, clock_ns: int, now_ns: int) -> None:
    """Record that a tenant's turn has ended, and how far the tenant and its unit are behind the clock.

    `clock_ns`: the device's clock. The caller calls this method at the end of a turn with work, and again after the
    next turn has begun.
    """
    own_ns = clock_ns
    if place.above:
        unit = place.above[-1]
        own_ns, behind_ns = unit.clock_ns, clock_ns - unit.virtual_ns(place.seen.devices)
        unit.left = Leave(now_ns, max(0, behind_ns))
    place.left = Leave(now_ns, max(0, own_ns - place.account.virtual_ns))


def waiters_of(places: Iterable[Place], running: Collection[Place], now_ns: int) -> list[Waiter]:
    """Return these tenants as waiters. A unit is charged in advance for the turns that tenants inside have now."""
    owed: dict[Unit, int] = {}
    for owner in running:
        if owner.above:
            unit = owner.above[-1]
            owed[unit] = owed.get(unit, 0) + owner.unpaid_ns(now_ns)
    if not owed:
        return [place.waiter(now_ns) for place in places]
    return [place.waiter(now_ns, unit_ahead_ns=sum(owed.get(u, 0) for u in place.above[-1:])) for place in places]
