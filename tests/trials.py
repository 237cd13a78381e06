"""Repeat a failed test only if it lost processor time to other machines or other tests.

A hypervisor gives processors to other machines (`steal` of /proc/stat), and other tests of the same run use them while
this one waits (the kernel's pressure figure). Both make any program late, and a failure of such a trial proves little
about the program. The failure is printed in full like all failures and counted in the last line of the run (`rerun`),
and the next trial starts later. Any other failure is final. Files that run alone at the beginning have no second trial
on a machine without other load.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import pytest

from tests.support.wait import waited_seconds

STOLEN_SHARE = 0.05  # part of the time of all processors, from the start of a trial; a quiet machine loses a hundredth
MOST_STOLEN = 2  # trials of one test that may be repeated for this reason
CROWDED_SHARE = 0.5  # part of a trial's time in which a program waited for a processor
MOST_CROWDED = 1
WAIT_SECONDS = 10
LAST_SECONDS = 60 * 60.0  # time of a run after which failures are final: a run may take 90 minutes


class Again(Exception):
    """The end of a trial that passed, if `--again` requests another.

    The next trial finds the state that this trial has left behind.
    """


@dataclass(frozen=True)
class Clock:
    """Seconds since the machine was started.

    Attributes:
        passed: elapsed seconds.
        stolen: processor seconds that the hypervisor gave to other machines, of all processors together.
        crowded: seconds in which a program waited for a processor.
        processors: their number.
    """

    passed: float
    stolen: float
    crowded: float = 0.0
    processors: int = 1

    @classmethod
    def now(cls) -> Clock:
        return cls(time.monotonic(), psutil.cpu_times().steal, waited_seconds(), psutil.cpu_count() or 1)

    def stolen_share_since(self, before: Clock) -> float:
        """Return the part of the time of all processors that was stolen."""
        return (self.stolen - before.stolen) / max((self.passed - before.passed) * self.processors, 1e-9)

    def crowded_share_since(self, before: Clock) -> float:
        """Return the part of the time in which a program waited for a processor."""
        return (self.crowded - before.crowded) / max(self.passed - before.passed, 1e-9)


class Trials:
    """The trials of one test.

    Args:
        until: when the last trial may begin, in seconds of the monotonic clock.
        clock: returns the present Clock.
    """

    def __init__(self, until: float, clock: Callable[[], Clock] = Clock.now) -> None:
        self._until, self._clock = until, clock
        self._stolen = self._crowded = 0
        self._began = clock()
        self._wait_seconds = 0.0  # before the next trial
        self.begun = 0

    def marker(self) -> pytest.MarkDecorator:
        """Return the mark for pytest-rerunfailures."""
        return pytest.mark.flaky(reruns=MOST_STOLEN + MOST_CROWDED + 1, condition=self.is_another_due)

    def begin(self) -> None:
        """Begin a trial. Wait before that if the last trial does not count."""
        time.sleep(self._wait_seconds)
        self._wait_seconds = 0
        self._began = self._clock()
        self.begun += 1

    def taken(self) -> str:
        """Return a text about the processor time that the trial has lost so far."""
        now = self._clock()
        return (
            f"{now.stolen_share_since(self._began):.0%} of them was given to other machines; "
            f"a program waited for one in {now.crowded_share_since(self._began):.0%} of the time; "
            f"the load of the last minute was {os.getloadavg()[0]:.1f}"
        )

    def is_another_due(self, error: BaseException | None) -> bool:
        """Return whether another trial follows. `error` is the reason for which this trial failed."""
        if not error:
            return False
        if isinstance(error, Again):
            return True
        if time.monotonic() + WAIT_SECONDS >= self._until:
            return False
        now = self._clock()
        if self._stolen < MOST_STOLEN and now.stolen_share_since(self._began) >= STOLEN_SHARE:
            self._stolen += 1
        elif self._crowded < MOST_CROWDED and now.crowded_share_since(self._began) >= CROWDED_SHARE:
            self._crowded += 1
        else:
            return False
        self._wait_seconds = WAIT_SECONDS
        return True
