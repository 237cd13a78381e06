"""Tells of levels that found no place: one event for each owner of bounds in a while, however many levels it lacks.

Owns: when which owner was told of. Never: refuses. Cannot fail.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from fgpu_ebpf.history import History
from fgpu_ebpf.level_places import LevelPlaces

PAUSE_SECONDS = 30.0
MOST_OWNERS = 256


class LevelRefusals:
    """`count`: how often a level found no place since the agent began."""

    def __init__(self, history: History, places: LevelPlaces) -> None:
        self._history, self._places = history, places
        self._told: dict[str, float] = {}
        self.count = 0

    def tell(self, refused: Mapping[str, str]) -> None:
        """These found none; by path, with the reason."""
        self.count += len(refused)
        owners = {path: self._places.owner(path).path for path in refused}
        more, now = Counter(owners.values()), time.monotonic()
        self._told = {owner: at for owner, at in self._told.items() if now - at < PAUSE_SECONDS}
        for path, owner in owners.items():
            if owner not in self._told and len(self._told) < MOST_OWNERS:
                self._told[owner] = now
                others = f", and {more[owner] - 1} more of it" if more[owner] > 1 else ""
                self._history.add("no room", tenant=path, text=f"{refused[path]}{others}")
