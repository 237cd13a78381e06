"""All units of a host: levels with a share that contain levels with shares (`nested_shares`).

A unit exists as long as its level has a share, so its used time is kept after the cgroups inside are removed. The
module runs in threads of the gatekeeper that hold the time slicer's lock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from fgpu_ebpf.scheduling.fair_queue import Share, Waiter
from fgpu_ebpf.scheduling.nested_shares import Unit, effective
from fgpu_ebpf.scheduling.state import NEVER_NS, Place

Inside = tuple[Place, tuple[Unit, ...]]


class Units:
    """All units, by level."""

    def __init__(self) -> None:
        self._units: dict[int, Unit] = {}

    def nest(self, places: Mapping[int, Place], tenant: int, levels: Sequence[int], now_ns: int) -> Iterator[Inside]:
        """Place a tenant inside these levels, innermost first. Yield each tenant whose units change, and the new units.

        A level that becomes a unit starts with the time that its own programs have used.
        """
        for number, level in enumerate(levels):
            if level not in self._units:
                place = places[level]
                owned_ns = {device: counts.owned_ns for device, counts in place.counts.items()}
                before = place.accounts, owned_ns, place.trust.standing
                self._units[level] = Unit(level, place.asked, now_ns, before)
                yield from self.nest(places, level, levels[number + 1 :], now_ns)
        above = tuple(unit for level in (tenant, *levels) if (unit := self._units.get(level)))
        if above != places[tenant].above:
            yield places[tenant], above

    def share_out(self, shares: Mapping[int, Share], now_ns: int) -> set[Unit]:
        """Set the shares of all levels, and remove the units of levels without a share.

        Returns:
            The units with virtual times that restarted.
        """
        self._units = {level: unit for level, unit in self._units.items() if level in shares}
        changed = [unit for level, unit in self._units.items() if unit.share != shares[level]]
        return {unit for unit in changed if unit.change(shares[unit.level], now_ns)}

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


def leave(place: Place, clocks: Mapping[int, int], now_ns: int) -> None:
    """Record that a tenant's turn has ended, and how far the tenant and its unit are behind the clock.

    `clocks` has the clock of each device. The caller calls this method at the end of a turn with work, and again after
    the next turn has begun.
    """
    for unit in place.above[-1:]:
        unit.leave(clocks, now_ns)
    place.accounts.leave(place.own_clocks(clocks), now_ns)


def waiters_of(
    places: Iterable[Place], running: Collection[Place], now_ns: int, owner: Place | None = None
) -> list[Waiter]:
    """Return these tenants, and an owner that would continue, as waiters.

    Virtual times on different devices cannot be compared. Therefore the virtual time of each waiter is counted from the
    lowest virtual time of a waiter on the same device, and the highest of these differences applies to a gang. A unit
    is charged in advance for the turns that tenants inside have now, and an owner for its work in flight,
    which is charged in any case.
    """
    owed: dict[Unit, int] = {}
    for one in running:
        if one.above:
            unit = one.above[-1]
            owed[unit] = owed.get(unit, 0) + one.unpaid_ns(now_ns)
    found = [*places, owner] if owner else [*places]
    outer, inner = [], []
    for place in found:
        devices = place.seen.devices
        own = place.accounts.virtual_ns(devices, place.flight_ns(now_ns) if place is owner else 0)
        for unit in place.above[-1:]:
            inner.append((unit.level, own))
            own = unit.virtual_ns(devices, owed.get(unit, 0))
        outer.append((place.share.rank, own))
    ahead, inside = _ahead(outer), iter(_ahead(inner))
    return [
        place.waiter(now_ns, ns, next(inside) if place.above else 0) for place, ns in zip(found, ahead, strict=True)
    ]


def _ahead(virtual: Sequence[tuple[int, Mapping[int, int]]]) -> list[int]:
    """Return how far each member of a group is ahead of the last member on a device.

    `virtual` has for each member its group, and its virtual time on each of its devices.
    """
    if all(len(times) == 1 for _, times in virtual):  # the order is the same, because no device matters to another
        return [at_ns for _, times in virtual for at_ns in times.values()]
    least: dict[tuple[int, int], int] = {}
    for group, times in virtual:
        for device, at_ns in times.items():
            if at_ns < least.get((group, device), NEVER_NS):
                least[group, device] = at_ns
    return [
        max([at_ns - least[group, device] for device, at_ns in times.items()], default=0) for group, times in virtual
    ]
