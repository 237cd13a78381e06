"""Comparison of an owner with its rivals, which are the tenants that wait for its devices: which tenant runs next.

The functions change no state and run in the gatekeeper's time slicer thread. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from fgpu_ebpf.scheduling import fair_queue, handover
from fgpu_ebpf.scheduling.fair_queue import Floor
from fgpu_ebpf.scheduling.share_groups import waiters_of
from fgpu_ebpf.scheduling.state import FLOOR_TURN_NS, Place, Turn


def outranked(place: Place, turn: Turn, rivals: Iterable[Place], now_ns: int) -> bool:
    """Return whether a rival has a higher priority than the owner and may end the owner's turn."""
    if turn.floor and now_ns < turn.opened_ns + FLOOR_TURN_NS:
        return False
    return any(rival.share.rank < place.share.rank for rival in rivals)


def comes_first_again(
    place: Place,
    turn: Turn,
    ready: Iterable[Place],
    running: Collection[Place],
    floors: Mapping[int, Floor],
    now_ns: int,
) -> bool:
    """Return whether the owner would also get the next turn."""
    waiters = waiters_of(ready, running, now_ns, owner=place)
    free = fair_queue.wanted(waiters) - handover.taken(running, now_ns) | turn.devices
    found = fair_queue.next_turns(waiters, free, floors, now_ns)
    return any(grant.tenant == place.tenant for grant in found)


def devices_of(places: Iterable[Place]) -> set[int]:
    """Return the devices on which these tenants have contexts."""
    found: set[int] = set()
    for place in places:
        found |= place.seen.devices
    return found


def missing(running: Iterable[Place], but: Place | None = None) -> set[int]:
    """Return the devices that owners use and that are not in their turns. Owners have precedence for these devices."""
    found: set[int] = set()
    for place in running:
        turn = place.turn
        if turn and not turn.closing_ns and not turn.devices.issuperset(place.seen.devices) and place is not but:
            found |= place.seen.devices - turn.devices
    return found
