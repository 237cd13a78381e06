"""How often a test that failed is tried again.

Processors that a hypervisor gave to other machines meanwhile (`steal` of /proc/stat) make any program late, and no
failure of such a trial says whose it was. It is printed in full as all are, but not counted; the next one comes later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import pytest

STOLEN_SHARE = 0.05  # of what all processors have to give, from the start of a trial; a quiet machine loses a hundredth
MOST_STOLEN = 10  # of one test: after that what fails has failed
FIRST_WAIT_SECONDS, BACKOFF = 1, 1.75  # ten wait for six minutes: others were seen to take five in a row
MOST_WAITS_SECONDS = 600  # of a process of pytest's, which has to end


class Again(Exception):
    """The end of a trial that passed, where `--again` wants to see another: it finds what this one has left."""


@dataclass(frozen=True)
class Clock:
    """What all processors had to give, and what was taken from them, in seconds since the machine was started."""

    passed: float
    stolen: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.monotonic() * (psutil.cpu_count() or 1), psutil.cpu_times().steal)

    def stolen_share_since(self, before: Clock) -> float:
        return (self.stolen - before.stolen) / max(self.passed - before.passed, 1e-9)


@dataclass
class Patience:
    """How long all tests together may still wait for processors of their own: a run has to end."""

    seconds: float = MOST_WAITS_SECONDS


class Trials:
    """One test's. `own` is how often it may be tried again where the machine was its own."""

    def __init__(self, own: int, patience: Patience, clock: Callable[[], Clock] = Clock.now) -> None:
        self.own, self.stolen, self.patience, self.clock = own, MOST_STOLEN, patience, clock
        self.began = clock()
        self.begun = 0
        self.wait_seconds = 0.0  # before the next

    def marker(self) -> pytest.MarkDecorator:
        """For pytest-rerunfailures."""
        return pytest.mark.flaky(reruns=self.own + MOST_STOLEN + 1, condition=self.is_another_due)

    def begin(self) -> None:
        """Waits first, where the last one was stolen."""
        time.sleep(self.wait_seconds)
        self.wait_seconds = 0
        self.began = self.clock()
        self.begun += 1

    def stolen_share(self) -> float:
        """Of what the processors had to give since the trial began."""
        return self.clock().stolen_share_since(self.began)

    def is_another_due(self, error: BaseException | None) -> bool:
        """Asked after each trial; one that passed has no error, and costs nobody's patience."""
        if not error:
            return False
        if isinstance(error, Again):
            return True
        wait = FIRST_WAIT_SECONDS * BACKOFF ** (MOST_STOLEN - self.stolen)
        if self.stolen and wait <= self.patience.seconds and self.stolen_share() >= STOLEN_SHARE:
            self.stolen -= 1
            self.patience.seconds -= wait
            self.wait_seconds = wait
            return True
        self.own -= 1
        return self.own >= 0
