"""Turns that still drain: whether the next turn gets their devices, and the time from which the next turn is charged.

The module runs in the gatekeeper's time slicer thread. Times are CLOCK_MONOTONIC nanoseconds. A *gang* is a tenant on
several devices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fgpu_ebpf import abi
from fgpu_ebpf.scheduling.state import Place, Turn


def next_begins_ns(running: Iterable[Place], devices: Collection[int], now_ns: int) -> int:
    """Return when the ending turns on these devices should have drained, and mark these turns as handed over.

    The tenants of these turns are charged for the devices until that time.
    """
    begins_ns = now_ns
    for place in running:
        turn = place.turn
        if turn and not turn.handed_ns and not turn.devices.isdisjoint(devices):
            turn.handed_ns = now_ns + place.flight_ns(now_ns)
            begins_ns = max(begins_ns, turn.handed_ns)
            # The device divides its time between the last work of this turn and the first work of the next turn, so the
            # drain may take longer. No other tenant waits for the end of the drain any more.
            turn.deadline_ns = max(turn.deadline_ns, turn.handed_ns + abi.BUDGET_NS)
    return begins_ns


def begin_earlier(running: Iterable[Place], before: Turn, ended_ns: int) -> None:
    """Correct the charges of the turns that follow `before`, which has drained at `ended_ns`, earlier than expected."""
    for place in running:
        turn = place.turn
        if turn and turn is not before and turn.begins_ns == before.handed_ns and turn.devices & before.devices:
            since_ns = max(ended_ns, place.begun_ns(turn))
            place.charge(turn.begins_ns - since_ns)


def late_gangs(running: Iterable[Place], now_ns: int) -> list[int]:
    """Return the owners with CUDA kernels that wait for kernels behind closed gates, and prolong their turns."""
    found = []
    for place in running:
        turn = place.turn
        if turn and 0 < place.meets_ns(turn) <= now_ns < turn.closing_ns + place.share.quantum_ns:
            turn.deadline_ns = max(turn.deadline_ns, now_ns + abi.BUDGET_NS)
            found.append(place.tenant)
    return found


def taken(running: Iterable[Place], now_ns: int) -> set[int]:
    """Return the devices with a turn that is not near its end."""
    found: set[int] = set()
    for place in running:
        if place.turn and not place.is_passing(place.turn, now_ns):
            found |= place.turn.devices
    return found
