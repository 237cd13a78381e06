"""When a test that failed is tried again: only if the hypervisor gave processors to other machines meanwhile.

That (`steal` of /proc/stat) makes any program late, and a failure of such a trial says nothing about the program. It is
printed in full like all failures, but not counted, and the next trial comes later. What fails otherwise has failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import pytest

STOLEN_SHARE = 0.05  # of what all processors have to give, from the start of a trial; a quiet machine loses a hundredth
MOST_STOLEN = 2  # trials of one test that do not count
WAIT_SECONDS = 10
LAST_SECONDS = 25 * 60.0  # of a run: after that what fails has failed


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


class Trials:
    """The trials of one test.

    Args:
        until: when the last trial may begin, in seconds of the monotonic clock.
        clock: returns what the processors had to give until now.
    """

    def __init__(self, until: float, clock: Callable[[], Clock] = Clock.now) -> None:
        self._until, self._clock, self._stolen = until, clock, 0
        self._began = clock()
        self._wait_seconds = 0.0  # before the next
        self.begun = 0

    def marker(self) -> pytest.MarkDecorator:
        """Return the mark for pytest-rerunfailures."""
        return pytest.mark.flaky(reruns=MOST_STOLEN + 1, condition=self.is_another_due)

    def begin(self) -> None:
        """Begin a trial, after a while if the last one was stolen."""
        time.sleep(self._wait_seconds)
        self._wait_seconds = 0
        self._began = self._clock()
        self.begun += 1

    def stolen_share(self) -> float:
        """Return the stolen share of what the processors had to give since the trial began."""
        return self._clock().stolen_share_since(self._began)

    def is_another_due(self, error: BaseException | None) -> bool:
        """Return whether there is another trial; asked after each. `error`: why this one failed."""
        if not error:
            return False
        if isinstance(error, Again):
            return True
        is_due = (
            self._stolen < MOST_STOLEN
            and time.monotonic() + WAIT_SECONDS < self._until
            and self.stolen_share() >= STOLEN_SHARE
        )
        if is_due:
            self._stolen += 1
            self._wait_seconds = WAIT_SECONDS
        return is_due
