"""Events for levels that were refused because there was no room.

There is at most one event for each bound owner in PAUSE_SECONDS, for any number of refused levels. The module runs in
the agent's main loop.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.level_capacity import LevelCapacity

PAUSE_SECONDS = 30.0
MOST_OWNERS = 256


class LevelRefusals:
    """Counter and reporter of refused levels. `count`: the number of refusals since the agent's start."""

    def __init__(self, history: EventLog, places: LevelCapacity) -> None:
        self._history, self._places = history, places
        self._reported: dict[str, float] = {}
        self.count = 0

    def report(self, refused: Mapping[str, str]) -> None:
        """Count and report refused levels. `refused`: the reasons, by path."""
        self.count += len(refused)
        owners = {path: self._places.owner(path).path for path in refused}
        more, now = Counter(owners.values()), time.monotonic()
        self._reported = {owner: at for owner, at in self._reported.items() if now - at < PAUSE_SECONDS}
        for path, owner in owners.items():
            if owner not in self._reported and len(self._reported) < MOST_OWNERS:
                self._reported[owner] = now
                others = f", and {more[owner] - 1} more cgroups of this workload" if more[owner] > 1 else ""
                self._history.add("no room", tenant=path, text=f"{refused[path]}{others}")
