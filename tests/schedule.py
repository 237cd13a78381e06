"""Distribute test files to the workers of pytest-xdist. Each worker has its own world.

A worker first takes the remaining files of its current suite, so that the suite's agent keeps running. Then it takes
the suite with the most remaining seconds per worker. Within a suite the longest file comes first. Some files that
measure time run at the beginning, in the first worker, while nothing else runs: early enough for another trial if
processors are taken from the machine (`trials`). For the other files that measure time it suffices that their worker
gets the processors first (`conftest`).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

TESTS = Path(__file__).parent
DURATIONS = TESTS / "durations.json"  # seconds of each file that takes a second or more; --renew-durations writes it
SHORT_SECONDS = 0.5
# Suites whose files share a slow start: engines, packages, a browser.
WHOLE = ("dashboards", "docs", "engines", "kubelet", "kubernetes", "packages", "page", "soak")
# In these files programs share a device's time: a program that gets no processor cannot use its turns.
QUIET = frozenset(
    f"tests/e2e/{name}.py"
    for name in ("test_compute", "test_concurrent_shares", "test_gangs", "test_many_tenants", "test_nested_shares")
)


def suite_of(scope: str) -> str:
    """Return the suite of a file, which is its folder in tests/."""
    return scope.split("/")[1]


class Durations:
    """A plugin that updates DURATIONS for the files that a run has tested, and keeps the others."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the time of a test, with its fixtures."""
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        known = json.loads(DURATIONS.read_text()) | {file: round(n, 1) for file, n in self._seconds.items()}
        kept = {file: n for file, n in sorted(known.items()) if n >= 1 and (TESTS.parent / file).exists()}
        DURATIONS.write_text(json.dumps(kept, indent=0) + "\n")


class Schedule(LoadScopeScheduling):
    """A scope is a file, or a suite of WHOLE."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._durations: dict[str, float] = json.loads(DURATIONS.read_text())
        self._suites: dict[WorkerController, str] = {}
        self._is_quiet = True  # only the first worker may run tests

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return f"tests/{suite_of(file)}" if suite_of(file) in WHOLE else file

    def _seconds(self, scope: str) -> float:
        if scope.endswith(".py"):
            return self._durations.get(scope, SHORT_SECONDS)
        return sum(seconds for file, seconds in self._durations.items() if file.startswith(f"{scope}/"))

    def _choose(self, node: WorkerController) -> str:
        """Return the scope that a worker runs next."""
        quiet = self.workqueue.keys() & QUIET
        if quiet:
            return max(sorted(quiet), key=self._seconds)
        work: Counter[str] = Counter()
        for scope in self.workqueue:
            work[suite_of(scope)] += self._seconds(scope)
        others = Counter(suite for other, suite in self._suites.items() if other is not node)
        suite = self._suites.get(node, "")
        if suite not in work:
            suite = max(work, key=lambda name: work[name] / (others[name] + 1))
        self._suites[node] = suite
        return max((scope for scope in self.workqueue if suite_of(scope) == suite), key=self._seconds)

    def _waits(self, node: WorkerController) -> bool:
        """Return whether a worker gets no work yet, because files of QUIET run in the first worker."""
        if self._is_quiet:
            left = [
                scope
                for units in self.assigned_work.values()
                for scope, unit in units.items()
                if not all(unit.values())
            ]
            self._is_quiet = any(scope in QUIET for scope in (*self.workqueue, *left))
        return self._is_quiet and node is not self.nodes[0]

    def _assign_work_unit(self, node: WorkerController) -> None:
        if not self._waits(node):
            self.workqueue.move_to_end(self._choose(node), last=False)
            super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        if not self._waits(node):
            super()._reschedule(node)

    def mark_test_complete(self, node: WorkerController, item_index: int, duration: float = 0) -> None:
        """Record that a worker has run a test; others may have waited for it."""
        was_quiet = self._is_quiet
        super().mark_test_complete(node, item_index, duration)
        if was_quiet:
            for other in self.nodes:
                self._reschedule(other)

    def remove_node(self, node: WorkerController) -> str | None:
        """Forget a worker that has exited. Return the test that it ran, if the worker crashed."""
        self._suites.pop(node, None)
        return super().remove_node(node)
