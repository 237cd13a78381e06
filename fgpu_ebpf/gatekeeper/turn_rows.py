"""Rows of the `turns` map by level and device: a tenant's own turns, and for a unit the sum of all inner tenants.

This module runs in the time slicer's thread of the gatekeeper, which writes the rows. This module does no I/O, and
stores the last published numbers of each unit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace

from fgpu_ebpf.ledger.compute_maps import Key, TurnCounts
from fgpu_ebpf.scheduling.counters import Counts
from fgpu_ebpf.scheduling.fair_queue import MILLION
from fgpu_ebpf.scheduling.nested_shares import Unit
from fgpu_ebpf.scheduling.state import Place


def counts_of(place: Place, device: int, part: int, entitled: int) -> TurnCounts:
    """Return a tenant's own row. On a device that the tenant does not use, the row has only the counters.

    Args:
        place: the tenant's state.
        device: the ledger index.
        part: millionths of the device's time that the tenant had since the last row.
        entitled: millionths of the device's time to which the tenant was entitled.
    """
    row, turn = TurnCounts(**asdict(place.counts.get(device, Counts()))), place.turn
    if device not in place.seen.devices:
        return row
    owner = int(device in place.free_on or (turn is not None and device in turn.devices and not turn.handed_ns))
    row.owner, row.had_millionths, row.entitled_millionths = owner, part, entitled
    row.free, row.since_ns = _free(place, device), place.since_ns or 0
    return row


def _free(place: Place, device: int) -> int:
    """Return 0 for a tenant with turns, 1 for a tenant that is alone, 2 for a tenant that runs beside other tenants."""
    return 0 if device not in place.free_on else 2 if place.lent else 1


class UnitRows:
    """Rows of units: time and parts of all tenants inside a unit, and waits and turns of the unit's own programs."""

    def __init__(self) -> None:
        self._told: dict[Key, tuple[Unit, int]] = {}  # with the unit's total owned time

    def over(
        self,
        rows: Mapping[Key, TurnCounts],
        places: Mapping[int, Place],
        due: Mapping[int, int],
        wanted: Collection[int],
        shares: Mapping[int, Collection[int]],
        span_ns: int,
        own: Mapping[int, Place],
    ) -> dict[Key, TurnCounts]:
        """Return rows of units, which replace the rows of the units' own programs.

        Args:
            rows: the rows of `places`.
            places: the tenants that have processes now or had processes at the last call.
            due: the entitlement of each tenant while this tenant and the tenants in `wanted` share the device.
            wanted: the tenants that have waited or had a turn since the last call.
            shares: devices by level.
            span_ns: time since the last call; 0: this call is the first.
            own: all tenants by level, also without processes. A unit's own programs are one of these tenants.
        """
        inside: dict[Key, list[Place]] = {}
        units = {key: unit for key, (unit, _) in self._told.items()}
        for place in places.values():
            for unit in place.above:
                for device in place.seen.devices.intersection(shares.get(unit.level, ())):
                    units[unit.level, device] = unit
                    inside.setdefault((unit.level, device), []).append(place)
        told, self._told, found = self._told, {}, dict[Key, TurnCounts]()
        for key, unit in units.items():
            (level, device), had_ns, members = key, unit.owned_ns(key[1]), inside.get(key, [])
            if device not in shares.get(level, ()):
                continue
            before, before_ns = told.get(key, (unit, had_ns))
            part = (had_ns - before_ns) * MILLION // span_ns if span_ns and members and before is unit else 0
            if members:
                self._told[key] = unit, had_ns
            entitled = [due.get(place.tenant, 0) for place in members if place.tenant in wanted]
            found[key] = replace(
                rows.get(key) or counts_of(own[level], device, 0, 0),  # its own programs may have exited
                owned_ns=had_ns,
                owner=max((counts_of(place, device, 0, 0).owner for place in members), default=0),
                had_millionths=part,
                entitled_millionths=sum(entitled) or max((due.get(place.tenant, 0) for place in members), default=0),
                free=max((_free(place, device) for place in members), default=0),
            )
        return found
