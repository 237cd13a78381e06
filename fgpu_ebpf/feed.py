"""Snapshots as they come, asked for aside: a hand on the keys never waits for the agent.

Owns: a thread that asks once a second, and what it heard last. Never: gives up: what fails is news too, and the next
answer mends it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fgpu_ebpf.bell import Bell
from fgpu_ebpf.control import RequestError

PERIOD_SECONDS = 1.0
SILENCE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class News:
    """The last Snapshot, and why there is none since; empty: this is of now. `heard`: when, on the monotonic clock."""

    snapshot: Mapping[str, Any]
    fault: str
    heard: float

    def now(self) -> News:
        """The same, where nobody has answered for a while with that for its fault."""
        silent = time.monotonic() - self.heard
        return replace(self, fault=f"no answer for {silent:.0f} s") if silent > SILENCE_SECONDS else self


class Feed:
    """Asks until the process ends, and rings the bell at every answer."""

    def __init__(self, ask: Callable[[], Mapping[str, Any]], bell: Bell) -> None:
        self._ask, self._bell = ask, bell
        self.news = self._heard(ask())
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(PERIOD_SECONDS)
            try:
                self.news = self._heard(self._ask())
            except (ConnectionError, RequestError) as error:
                self.news = replace(self.news, fault=str(error), heard=time.monotonic())
            self._bell.ring()

    @staticmethod
    def _heard(snapshot: Mapping[str, Any]) -> News:
        return News(snapshot, "", time.monotonic())
