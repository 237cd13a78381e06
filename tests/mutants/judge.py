"""Run pytest and report how it ended: a test's own assertion failed, or something else went wrong.

usage: python judge.py retry|once PYTEST_ARGUMENT…: its exit status is the Outcome. `once` makes no second trial.
"""

from __future__ import annotations

import enum
import subprocess
import sys

import pytest


class Outcome(enum.IntEnum):
    """The result of a run of tests, as exit statuses that neither Python nor a shell uses."""

    PASSED = 0
    ASSERTED = 40  # an assertion of a test failed
    HUNG = 41  # its time limit was over
    RAISED = 42  # a test raised another exception
    BROKE = 43  # a test was not collected, not set up, skipped or not found: no result


def outcome_of(error: BaseException) -> Outcome:
    """Return the outcome of a test that ended with this exception."""
    if isinstance(error, BaseExceptionGroup):
        return min(map(outcome_of, error.exceptions))
    if isinstance(error, pytest.fail.Exception):
        return Outcome.HUNG if str(error).startswith("Timeout") else Outcome.ASSERTED
    if isinstance(error, AssertionError):
        return Outcome.ASSERTED
    return Outcome.HUNG if isinstance(error, TimeoutError | subprocess.TimeoutExpired) else Outcome.RAISED


class Judge:
    """A plugin of pytest that records how tests ended."""

    def __init__(self, once: bool) -> None:
        self.once = once
        self.passed = 0
        self.ends: list[Outcome] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items if self.once else ():
            item.own_markers = [mark for mark in item.own_markers if mark.name != "flaky"]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.ends.append(Outcome.BROKE)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
        report = yield
        if report.failed and call.excinfo:
            self.ends.append(Outcome.BROKE if call.when == "setup" else outcome_of(call.excinfo.value))
        elif report.when == "call":
            self.passed += report.passed
        return report

    def outcome(self, code: int) -> Outcome:
        """Return the outcome of the whole run, whose exit status was `code`."""
        if code == pytest.ExitCode.OK and self.passed:
            return Outcome.PASSED  # even if a first trial has failed
        if code != pytest.ExitCode.TESTS_FAILED or Outcome.BROKE in self.ends:
            return Outcome.BROKE
        return min(self.ends, default=Outcome.BROKE)


if __name__ == "__main__":
    judge = Judge(once=sys.argv[1] == "once")
    sys.exit(judge.outcome(pytest.main(sys.argv[2:], plugins=[judge])))
