"""Shortfalls of busy tenants, which get less of a device's time than is due to these tenants by weight and ceiling.

This module runs in the agent's main thread. The gatekeeper's counts are read once a second and compared over ten
seconds. A tenant is busy if the tenant owned the device or waited for the device in more than nine tenths of these
seconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from fgpu_ebpf.ledger.compute_maps import Key, TurnCounts
from fgpu_ebpf.snapshot import Shortfall
from fgpu_ebpf.tenancy.event_log import EventLog

LOOK_SECONDS = 1.0
LOOKS = 10
MUCH = 0.05  # a part of a device's time
WANTS = 0.9  # a tenant that owned or awaited the device in more than this part of the time is busy
MILLION, NS = 1_000_000, 1_000_000_000


class _Look(NamedTuple):
    at: float
    counts: TurnCounts

    def busy_ns(self) -> int:
        """Return the time for which the tenant has owned the device or waited for the device, so far."""
        waiting_ns = int(self.at * NS) - self.counts.since_ns if self.counts.since_ns else 0
        return self.counts.owned_ns + self.counts.wait_ns + max(0, waiting_ns)


_Looks: TypeAlias = deque[_Look]


class Shortfalls:
    """The shortfalls of the last ten seconds.

    Args:
        turns: returns the gatekeeper's counts by level and device.
        name_of: returns the tenant of a level.
        history: the event log, which gets an event when a shortfall begins.
    """

    def __init__(
        self, turns: Callable[[], Mapping[Key, TurnCounts]], name_of: Callable[[int], str], history: EventLog
    ) -> None:
        self._turns, self._name_of, self._history = turns, name_of, history
        self._looks: dict[Key, _Looks] = {}
        self._looked_at = -LOOK_SECONDS
        self.found: Mapping[Key, Shortfall] = MappingProxyType({})

    def look(self) -> None:
        """Compute the shortfalls from the present counts, at most once a second, and report new shortfalls."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        gated = {key: counts for key, counts in self._turns().items() if not counts.free}
        self._looks = {key: self._with(key, _Look(now, counts)) for key, counts in gated.items()}
        known = {key: looks for key, looks in self._looks.items() if len(looks) > LOOKS}
        found = {key: self._shortfall(key, known) for key in known if _wants(known[key])}
        short = {key: shortfall for key, shortfall in found.items() if shortfall.ratio > MUCH}
        for (level, device), shortfall in short.items():
            if (level, device) not in self.found:
                self._history.add("short of time", tenant=self._name_of(level), gpu=device, text=shortfall.why)
        self.found = short

    def _with(self, key: Key, look: _Look) -> _Looks:
        looks = self._looks.get(key, deque(maxlen=LOOKS + 1))
        if looks and look.counts.owned_ns < looks[-1].counts.owned_ns:  # a new gatekeeper or share counts from 0
            looks.clear()
        looks.append(look)
        return looks

    def _shortfall(self, key: Key, known: Mapping[Key, _Looks]) -> Shortfall:
        looks = known[key]
        ratio = _entitled(looks) - _had(looks)
        text = f"had {_had(looks):.1%} in {looks[-1].at - looks[0].at:.0f} s, entitled to {_entitled(looks):.1%}"
        others = {other: its for other, its in known.items() if other[1] == key[1] and other != key}
        most = max(others, key=lambda other: _had(others[other]) - _entitled(others[other]), default=None)
        if most is None or _had(others[most]) - _entitled(others[most]) < ratio / 2:
            why = (
                "no other tenant exceeded its entitlement by half of this shortfall: "
                "time is lost between turns, or not used in turns"
            )
        else:
            its = others[most]
            why = f"{self._name_of(most[0])} had {_had(its):.1%}, entitled to {_entitled(its):.1%}"
            if overruns := its[-1].counts.overruns - its[0].counts.overruns:
                why += f", and {overruns} of its turns ended with work in flight"
        return Shortfall(ratio, f"{text}; {why}")


def _seconds(looks: _Looks) -> float:
    return looks[-1].at - looks[0].at


def _had(looks: _Looks) -> float:
    return (looks[-1].counts.owned_ns - looks[0].counts.owned_ns) / NS / _seconds(looks)


def _entitled(looks: _Looks) -> float:
    _, *later = looks
    return sum(look.counts.entitled_millionths for look in later) / MILLION / len(later)


def _wants(looks: _Looks) -> bool:
    return (looks[-1].busy_ns() - looks[0].busy_ns()) / NS / _seconds(looks) > WANTS
