"""A measurement of the agent's reply times while a test does something else."""

from __future__ import annotations

import threading
import time

from tests.support.commands import ask
from tests.support.wait import waited_here, waiting_of

PAUSE_SECONDS = 0.02


class Pings:
    """A thread that sends requests to the agent's control socket inside a `with`.

    The time in which this thread or the agent waited for a processor does not count.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        agent = ask(verb="ping")["pid"]
        while not self._over.wait(PAUSE_SECONDS):
            waiting, waited, begun = waiting_of(agent), waited_here(), time.monotonic()
            ask(verb="ping")
            seconds = time.monotonic() - begun
            self.seconds.append(max(0.0, seconds - waiting() - (waited_here() - waited)))

    def __enter__(self) -> Pings:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def p99(self) -> float:
        """Return the seconds within which 99 of 100 replies came."""
        return sorted(self.seconds)[len(self.seconds) * 99 // 100]

    def __str__(self) -> str:
        slowest = max(self.seconds)
        return f"{len(self.seconds)} replies, 99 of 100 within {self.p99():.3f} s, the slowest after {slowest:.3f} s"
