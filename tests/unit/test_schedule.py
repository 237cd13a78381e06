"""Tests of tests/schedule.py: each test runs once, and files that measure shares of a device run alone and first."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from tests.schedule import QUIET, Schedule, suite_of


class Worker:
    """A worker of pytest-xdist. It holds its last test until it gets another, or is shut down."""

    def __init__(self, number: int) -> None:
        self.gateway = SimpleNamespace(id=f"gw{number}")
        self.queue: list[int] = []
        self.shutting_down = False

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        assert not self.shutting_down
        self.queue += indices

    def shutdown(self) -> None:
        self.shutting_down = True

    def can_run(self) -> bool:
        return len(self.queue) > 1 or (self.shutting_down and bool(self.queue))


def run(tests: list[str], workers: int) -> list[tuple[str, str, int]]:
    """Run a test of each worker in turn. Return a list of (test, worker, number of workers with a test to run)."""
    config = SimpleNamespace(
        option=SimpleNamespace(loadscopereorder=False, tx=[f"{workers}*popen"]),
        getvalue=lambda name: [f"{workers}*popen"],
        getoption=lambda name: [f"{workers}*popen"],
    )
    schedule = Schedule(config, None)
    pool = [Worker(number) for number in range(workers)]
    for worker in pool:
        schedule.add_node(worker)
    for worker in pool:
        schedule.add_node_collection(worker, tests)
    schedule.schedule()
    done = []
    while any(worker.can_run() for worker in pool):
        for worker in pool:
            if worker.can_run():
                busy = sum(other.can_run() for other in pool)
                index = worker.queue.pop(0)
                done.append((tests[index], worker.gateway.id, busy))
                schedule.mark_test_complete(worker, index)
    assert not any(worker.queue for worker in pool), "a test is never run"
    return done


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_each_test_runs_once_and_each_measuring_test_alone(workers: int) -> None:
    quiet = [f"{file}::test_{number}" for file in sorted(QUIET) for number in range(3)]
    ordinary = [f"tests/e2e/test_{file}.py::test_{number}" for file in "abcdef" for number in range(file == "a" or 7)]
    ordinary += [f"tests/page/test_{file}.py::test_it" for file in "ab"]
    done = run([*quiet, *ordinary], workers)
    assert sorted(test for test, _, _ in done) == sorted([*quiet, *ordinary])
    assert {test for test, _, _ in done[: len(quiet)]} == set(quiet)
    assert len({worker for _, worker, _ in done[: len(quiet)]}) == 1
    assert all(busy == 1 for test, _, busy in done if test in quiet)
    assert len({worker for _, worker, _ in done}) == workers
    assert len({worker for test, worker, _ in done if suite_of(test) == "page"}) == 1
