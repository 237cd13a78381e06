"""The audit of turns, which compares the time that a tenant ran on a device, according to NVML, with the owned time.

The audit runs in the reconcile thread. The audit keeps the times of gated tenants for ten seconds, and has no result
for a tenant that has been gated for a shorter time. Every second the audit also reports NVML's running times to the
gatekeeper. If NVML does not report the running times of processes on a device, there is no result for the tenants on
that device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Set
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.compute_maps import ComputeMaps, Key, TurnCounts
from fgpu_ebpf.ledger.process_entry import Process

LOOK_SECONDS = 1.0
MOST_SECONDS = 2 * LOOK_SECONDS  # the longest time that one check covers, even if the check is late
LOOKS = 10
MUCH = 0.1  # ratio of a device's time: twice the ratio that a program can gain by a false report about a turn
NOTHING_PARTS = 50  # a tenant that ran for less than 1/50 of the time that it owned counts as running nothing
NS = 1_000_000_000
Percent: TypeAlias = Mapping[int, int]  # by host pid: percent of a device's time, by NVML


class Verdict(NamedTuple):
    """The result of an audit, for tenants that have been observed for ten seconds.

    `beyond`: the ratio of a device's time that a tenant ran minus the ratio that the tenant owned. The value is usually
    below 0, because kernels do not fill a whole turn. `outside`: host pids that run on a device on which the `beyond`
    of their tenant is above MUCH. `empty`: host pids with contexts on a device, if their tenant owned more than MUCH of
    the device's time and ran almost nothing (NOTHING_PARTS). If the tenant has no context on the device, all its
    processes with the shim are in `empty`: turns for a device need only a report.
    """

    beyond: Mapping[Key, float] = {}
    outside: frozenset[int] = frozenset()
    empty: frozenset[int] = frozenset()


class _Look(NamedTuple):
    at: float
    owned_ns: int
    ran: float  # ratio of the time since the previous check
    pids: frozenset[int]


class Audit:
    """The times of gated tenants in the last ten seconds, for the comparison of turns with NVML."""

    def __init__(self) -> None:
        self._looks: dict[Key, deque[_Look]] = {}
        self._at = 0.0

    def due(self, now: float) -> bool:
        """Return True if a second of the monotonic clock has passed since the last check."""
        return now - self._at >= LOOK_SECONDS

    def look(
        self, now: float, percents: Mapping[int, Percent | None], times: ComputeMaps, processes: Mapping[int, Process]
    ) -> Verdict:
        """Compare turns with NVML. The caller calls this method about once a second.

        Args:
            now: the time on the monotonic clock.
            percents: the percentages of the last second by device, or None if unknown.
            times: the shares, the counts of turns, and the running times for the gatekeeper.
            processes: the processes of the ledger.
        """
        self._at = now
        turns = times.turns()
        # A tenant without counts has owned nothing.
        counts = {place: turns.get(place, TurnCounts()) for place in times.shared()}
        gated = {place: found for place, found in counts.items() if not found.free}
        self._looks = {place: looks for place, looks in self._looks.items() if place in gated}
        for device in {device for _, device in gated}:
            percent = percents.get(device)
            for place in (place for place in gated if place[1] == device):
                self._enter(place, now, gated[place].owned_ns, percent, processes)
                self._tell(place, times)
        known = {place: looks for place, looks in self._looks.items() if len(looks) > LOOKS and not _has_gap(looks)}
        beyond = {place: _ran(looks) - _owned(looks) for place, looks in known.items()}
        outside = (known[place][-1].pids for place, part in beyond.items() if part > MUCH)
        empty = [place for place, looks in known.items() if _is_empty(looks)]
        return Verdict(beyond, frozenset().union(*outside), _turn_takers(empty, counts.keys(), processes))

    def _enter(
        self, place: Key, now: float, owned_ns: int, percent: Percent | None, processes: Mapping[int, Process]
    ) -> None:
        if percent is None:
            self._looks.pop(place, None)
            return
        own = {pid: part for pid, part in percent.items() if pid in processes and place[0] in processes[pid].levels}
        looks = self._looks.setdefault(place, deque(maxlen=LOOKS + 1))
        if looks and owned_ns < looks[-1].owned_ns:  # the counter was reset
            looks.clear()
        looks.append(_Look(now, owned_ns, min(1.0, sum(own.values()) / 100), frozenset(own)))

    def _tell(self, place: Key, times: ComputeMaps) -> None:
        """Report to the gatekeeper the time that a tenant ran, according to NVML.

        A tenant with a ceiling is charged for at least this time, less a tolerance (`scheduling.observed_usage`).
        """
        looks = self._looks.get(place)
        if looks and len(looks) > 1:
            seconds = min(MOST_SECONDS, looks[-1].at - looks[-2].at)
            times.add_ran(*place, int(looks[-1].ran * seconds * NS))


def _has_gap(looks: deque[_Look]) -> bool:
    """Return True if the audit paused between two checks: only the owned time, not the running time, covers a pause."""
    return any(after.at - before.at > MOST_SECONDS for before, after in pairwise(looks))


def _owned(looks: deque[_Look]) -> float:
    first, last = looks[0], looks[-1]
    return (last.owned_ns - first.owned_ns) / NS / (last.at - first.at)


def _ran(looks: deque[_Look]) -> float:
    _, *rest = looks
    return sum(look.ran for look in rest) / len(rest)


def _is_empty(looks: deque[_Look]) -> bool:
    owned = _owned(looks)
    return owned > MUCH and _ran(looks) < owned / NOTHING_PARTS


def _turn_takers(places: Iterable[Key], shared: Set[Key], processes: Mapping[int, Process]) -> frozenset[int]:
    """Return the host pids that may have taken these turns: the turns of a group also count those of its tenants."""
    found = set[int]()
    for level, device in places:
        inside = {
            pid: process for pid, process in processes.items()
            if next((each for each in process.levels if (each, device) in shared), 0) == level
        }  # fmt: skip
        users = {pid for pid, process in inside.items() if process.contexts[device]}
        found |= users or {pid for pid, process in inside.items() if process.flags & abi.Seen.SHIM}
    return frozenset(found)
