"""Turns that passed while a tenant had work in flight: told in `fgpu events`, with how many there were.

Owns: how many of each tenant's have been told. Never: tells of one tenant and device more than once in ten seconds;
what comes meanwhile is in the next line. Cannot fail: a share that is gone is forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from fgpu_ebpf.history import History
from fgpu_ebpf.timebook import TurnCounts

LOOK_SECONDS = 1.0
AGAIN_SECONDS = 10.0
_Turns = Mapping[tuple[int, int], TurnCounts]


class Overruns:
    """`turns` answers what came of all shares so far, by level and device; `name_of` whose a level is."""

    def __init__(self, turns: Callable[[], _Turns], name_of: Callable[[int], str], history: History) -> None:
        self._turns = turns
        self._name_of = name_of
        self._history = history
        self._told = {key: counts.overruns for key, counts in turns().items()}
        self._told_at: dict[tuple[int, int], float] = {}
        self._looked_at = -LOOK_SECONDS

    def look(self) -> None:
        """Tells of what is new, once a second at most."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        turns = self._turns()
        self._told = {key: told for key, told in self._told.items() if key in turns}
        self._told_at = {key: at for key, at in self._told_at.items() if now - at < AGAIN_SECONDS}
        for key, counts in turns.items():
            told = self._told.setdefault(key, 0)
            if counts.overruns < told:  # the level is another's now
                told = 0
            if counts.overruns > told and key not in self._told_at:
                self._tell(key, counts.overruns - told)
                self._told[key], self._told_at[key] = counts.overruns, now

    def _tell(self, key: tuple[int, int], number: int) -> None:
        level, device = key
        turns = "a turn" if number == 1 else f"{number} turns"
        text = f"{turns} passed with work in flight"
        self._history.add("overrun", tenant=self._name_of(level), gpu=device, text=text)
