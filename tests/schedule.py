"""The distribution of test files to the workers of pytest-xdist, each of which has its own world.

Files of the suite that a worker runs come first, so that the suite's agent stays. Otherwise the worker takes the suite
with the most work for each worker that is in it. Within a suite the longest file comes first. Files that measure time
come first in one worker, so that another trial is possible if processors are taken from the machine (`trials`). The
worker gets the processors before the others (`conftest`).
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
TIMED = frozenset(
    f"tests/{name}.py"
    for name in (
        "e2e/test_cgroup_floods",
        "e2e/test_compute",
        "e2e/test_empty_turns",
        "e2e/test_gangs",
        "e2e/test_many_tenants",
        "e2e/test_nested_shares",
        "gatekeeper/test_storm",
        "shim/test_shim_flight",
        "shim/test_shim_turns",
        "sim/test_collectives",
        "sim/test_engines",
        "sim/test_faults",
        "sim/test_graphs",
        "sim/test_timeslice",
        "unit/test_slicer",
    )
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

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return f"tests/{suite_of(file)}" if suite_of(file) in WHOLE else file

    def _seconds(self, scope: str) -> float:
        if scope.endswith(".py"):
            return self._durations.get(scope, SHORT_SECONDS)
        return sum(seconds for file, seconds in self._durations.items() if file.startswith(f"{scope}/"))

    def _choose(self, node: WorkerController) -> str:
        """Return the scope that a worker runs next."""
        timed = self.workqueue.keys() & TIMED
        ordinary = self.workqueue.keys() - TIMED
        if timed and not (ordinary and self._another_measures(node)):
            return max(sorted(timed), key=lambda file: (suite_of(file) == self._suites.get(node), self._seconds(file)))
        work: Counter[str] = Counter()
        for scope in ordinary:
            work[suite_of(scope)] += self._seconds(scope)
        others = Counter(suite for other, suite in self._suites.items() if other is not node)
        suite = self._suites.get(node, "")
        if suite not in work:
            suite = max(work, key=lambda name: work[name] / (others[name] + 1))
        self._suites[node] = suite
        return max((scope for scope in sorted(ordinary) if suite_of(scope) == suite), key=self._seconds)

    def _another_measures(self, node: WorkerController) -> bool:
        """Return whether another worker has a file that measures time and has not run all of it."""
        return any(
            scope in TIMED and not all(tests.values())
            for other, scopes in self.assigned_work.items()
            for scope, tests in scopes.items()
            if other is not node
        )

    def _assign_work_unit(self, node: WorkerController) -> None:
        self.workqueue.move_to_end(self._choose(node), last=False)
        super()._assign_work_unit(node)

    def remove_node(self, node: WorkerController) -> str | None:
        """Forget a worker that has exited. Return the test that it ran, if the worker crashed."""
        self._suites.pop(node, None)
        return super().remove_node(node)
