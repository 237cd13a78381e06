"""All units of a host: levels with a share that have levels with shares inside (`nested_shares`).

Owns: one unit for each such level, for as long as the level has a share: what it has used outlives the cgroups inside.
Used by `turns`. Cannot fail.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from fgpu_ebpf.nested_shares import Unit, effective
from fgpu_ebpf.places import Place
from fgpu_ebpf.scheduler import Share, Waiter

Inside = tuple[Place, tuple[Unit, ...]]


class Units:
    """By level."""

    def __init__(self) -> None:
        self._units: dict[int, Unit] = {}

    def nest(self, places: Mapping[int, Place], tenant: int, levels: Sequence[int]) -> Iterator[Inside]:
        """A tenant lies inside these levels, innermost first: whatever is in other units than before, and in which.

        A level that becomes a unit has used what its own place has.
        """
        for number, level in enumerate(levels):
            if level not in self._units:
                self._units[level] = Unit(level, places[level].asked, places[level].account)
                yield from self.nest(places, level, levels[number + 1 :])
        above = tuple(unit for level in (tenant, *levels) if (unit := self._units.get(level)))
        if above != places[tenant].above:
            yield places[tenant], above

    def share_out(self, shares: Mapping[int, Share], now_ns: int) -> None:
        """From now on these levels have these shares, and no other level has one."""
        self._units = {level: unit for level, unit in self._units.items() if level in shares}
        for level, unit in self._units.items():
            unit.change(shares[level], now_ns)

    def of(self, above: Sequence[Unit]) -> tuple[Unit, ...]:
        """Those of them that still are."""
        return tuple(unit for unit in above if self._units.get(unit.level) is unit)

    def differs(self, place: Place, share: Share) -> bool:
        """Another share was asked for than the place has, or the units around it are others, or have others."""
        above = self.of(place.above)
        return place.asked != share or above != place.above or place.share != effective(share, above)


def first_inside(place: Place, others: Iterable[Place]) -> bool:
    """Nothing else of its unit is among these."""
    unit = place.above[-1] if place.above else None
    return unit is None or not any(other is not place and unit in other.above for other in others)


def waiters_of(places: Iterable[Place], running: Collection[Place], now_ns: int) -> list[Waiter]:
    """These as they want a turn. What a turn under way in their unit will cost, the unit pays in any case."""
    owed: dict[Unit, int] = {}
    for owner in running:
        for unit in owner.above[-1:]:
            owed[unit] = owed.get(unit, 0) + owner.unpaid_ns(now_ns)
    return [place.waiter(now_ns, unit_ahead_ns=sum(owed.get(u, 0) for u in place.above[-1:])) for place in places]
