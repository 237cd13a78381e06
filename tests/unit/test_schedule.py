"""Tests of tests/schedule.py: each test runs once, and no two files that measure time run at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from tests.schedule import TIMED, Schedule, suite_of


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


def run(tests: list[str], workers: int) -> list[list[tuple[str, str]]]:
    """Run tests by turns. Return rounds of (test, worker): those that ran at the same time."""
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
    rounds = []
    while any(worker.can_run() for worker in pool):
        running = [(worker, worker.queue.pop(0)) for worker in pool if worker.can_run()]
        rounds.append([(tests[index], worker.gateway.id) for worker, index in running])
        for worker, index in running:
            schedule.mark_test_complete(worker, index)
    assert not any(worker.queue for worker in pool), "a test is never run"
    return rounds


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_each_test_runs_once_and_no_two_measuring_files_at_the_same_time(workers: int) -> None:
    timed = [f"{file}::test_{number}" for file in sorted(TIMED) for number in range(3)]
    ordinary = [f"tests/e2e/test_{file}.py::test_{number}" for file in range(40) for number in range(file == 0 or 7)]
    ordinary += [f"tests/page/test_{file}.py::test_it" for file in "ab"]
    rounds = run([*timed, *ordinary], workers)
    done = [found for each in rounds for found in each]
    assert sorted(test for test, _ in done) == sorted([*timed, *ordinary])
    assert all(len([test for test, _ in each if test in timed]) <= 1 for each in rounds)
    last = max(number for number, each in enumerate(rounds) if any(test in timed for test, _ in each))
    assert last < 2 * len(timed), "they begin early"
    assert len({worker for _, worker in done}) == workers
    assert len({worker for test, worker in done if suite_of(test) == "page"}) == 1
