"""Tests of tests/trials.py: only a failed test that lost processor time is repeated."""

from __future__ import annotations

import re
import time
from pathlib import Path

import psutil
import pytest

from tests.trials import (
    CROWDED_SHARE,
    LAST_SECONDS,
    MOST_CROWDED,
    MOST_STOLEN,
    STOLEN_SHARE,
    WAIT_SECONDS,
    Clock,
    Trials,
)
from tests.unit.pytest_kit import asked_of_copy

THIRD = """
count = 0
def test_first():
    pass
def test_third():
    global count
    count += 1
    assert count == 3
"""
# The first failure stops pytest-timeout's timer.
HANGS = """
import time
count = 0
def test_hangs():
    global count
    count += 1
    if count == 2:
        time.sleep(1000)
    assert count == 3
"""
# The second test cannot be repeated, because of the state that it has left.
LEFT = """
def test_leaves_nothing():
    pass
def test_leaves_a_folder(tmp_path):
    (tmp_path.parent / "folder").mkdir()
"""
# As if a hypervisor had taken this much of every trial. A real hypervisor may do so too.
TAKEN = """
from tests import trials
trials.WAIT_SECONDS = 0
trials.Clock.stolen_share_since = lambda *_: {share}
trials.Clock.crowded_share_since = lambda *_: {crowded}
begin = trials.Trials.begin
trials.Trials.begin = lambda self: print("begun") or begin(self)
"""


class Taken:
    """A clock of a machine with two processors. The hypervisor takes `share` of their time.

    In the part `crowded` of the time, a program waits for a processor.
    """

    def __init__(self, share: float, crowded: float = 0.0) -> None:
        self.share, self.crowded, self.seconds = share, crowded, 0

    def __call__(self) -> Clock:
        self.seconds += 1
        return Clock(self.seconds, 2.0 * self.seconds * self.share, self.seconds * self.crowded, 2)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of waits in seconds. The waits take no time."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


def tries(trials: Trials) -> int:
    """Return how often a test is repeated, if it fails every time."""
    for count in range(100):
        if not trials.is_another_due(AssertionError()):
            return count
        trials.begin()
    raise AssertionError("the test is repeated without end")


def later() -> float:
    return time.monotonic() + LAST_SECONDS


@pytest.mark.parametrize(
    ("share", "crowded", "more"),
    [
        (0.0, 0.0, 0),
        (0.9 * STOLEN_SHARE, 0.9 * CROWDED_SHARE, 0),
        (1.1 * STOLEN_SHARE, 0.0, MOST_STOLEN),
        (0.0, 1.1 * CROWDED_SHARE, MOST_CROWDED),
        (1.1 * STOLEN_SHARE, 1.1 * CROWDED_SHARE, MOST_STOLEN + MOST_CROWDED),
    ],
)
def test_only_tests_that_lost_processor_time_are_repeated(
    waits: list[float], share: float, crowded: float, more: int
) -> None:
    assert tries(Trials(later(), Taken(share, crowded))) == more
    assert waits == [WAIT_SECONDS] * more


def test_no_trial_starts_after_the_time_limit_of_the_run(waits: list[float]) -> None:
    assert tries(Trials(time.monotonic(), Taken(0.3))) == 0


def test_time_taken_before_a_trial_does_not_count() -> None:
    clock = Taken(0.9, 0.9)
    trials = Trials(later(), clock)
    assert trials.taken().startswith("90% of them")
    trials.begin()
    clock.share = clock.share * clock.seconds / (clock.seconds + 1)  # nothing was taken of the next second
    clock.crowded = clock.crowded * clock.seconds / (clock.seconds + 1)
    quiet = "0% of them was given to other machines; a program waited for one in 0% of the time"
    assert re.fullmatch(rf"{quiet}; the load of the last minute was \d+\.\d", trials.taken())


def test_the_clock_reads_the_kernel_s_figures() -> None:
    """The clock's time of all processors matches the sum of the kernel's processor times since the boot within 20 %."""
    before = psutil.cpu_times().steal
    now = Clock.now()
    assert before <= now.stolen <= now.passed * now.processors
    assert now.passed * now.processors == pytest.approx(sum(psutil.cpu_times()[:8]), rel=0.2)
    assert 0 <= now.crowded <= now.passed


def asked(work: Path, tests: str, share: float, *options: str, crowded: float = 0.0) -> str:
    """Return pytest's output for these tests with the conftest.py that all suites share."""
    taken = TAKEN.format(share=share, crowded=crowded)
    return asked_of_copy(work, tests, taken, "-s", "--rerun-show-tracebacks", *options).stdout


@pytest.mark.parametrize(("share", "end", "failed"), [(0.3, "2 passed, 2 rerun", 2), (0.0, "1 failed, 1 passed", 1)])
def test_pytest_repeats_a_test_that_lost_processor_time(tmp_path: Path, share: float, end: str, failed: int) -> None:
    out = asked(tmp_path, THIRD, share)
    assert re.search(rf"\b{end}\b", out), out
    assert out.count("begun") == sum(map(int, re.findall(r"\d+", end))), out
    assert out.count(f"{share:.0%} of them was given to other machines") == failed, out


def test_each_trial_has_its_own_timeout(tmp_path: Path) -> None:
    out = asked(tmp_path, HANGS, 0.3, "--timeout=2")
    assert re.search(r"\b1 passed, 2 rerun\b", out), out
    assert "Timeout (>2.0s)" in out


def test_option_again_finds_state_that_a_trial_leaves(tmp_path: Path) -> None:
    assert re.search(r"\b2 passed\b", asked(tmp_path / "once", LEFT, 0.0))
    out = asked(tmp_path / "again", LEFT, 0.0, "--again")
    assert re.search(r"\b1 failed, 1 passed, 2 rerun\b", out), out
    assert "FileExistsError" in out
