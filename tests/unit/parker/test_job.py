"""The order of calls of a job, and what it undoes, with each call failing in each way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fgpu_ebpf.parker.cuda import ILLEGAL_STATE, NOT_READY, DriverError, State
from fgpu_ebpf.parker.protocol import Outcome
from tests.unit.parker.parker_kit import UNKNOWN_ERROR, Bench

PIDS = (7, 8, 9)


def each(name: str) -> list[tuple[str, int]]:
    return [(name, pid) for pid in PIDS]


def test_all_processes_are_locked_and_then_all_are_checkpointed() -> None:
    bench = Bench()
    assert bench.job().park() == Outcome("parked")
    assert bench.driver.calls == each("lock") + each("checkpoint")
    assert bench.said == [{"at": "locked"}, {"at": "checkpointed", "seconds": 0.0}]


def test_all_processes_are_restored_before_any_is_unlocked() -> None:
    bench = Bench(state=State.CHECKPOINTED)
    assert bench.job().wake() == Outcome("running")
    assert bench.driver.calls == each("restore") + each("unlock")
    assert bench.said == [{"at": "restored", "seconds": 0.0}]


def test_a_process_with_a_thread_in_a_call_is_not_checkpointed() -> None:
    bench = Bench()
    bench.targets[1].quiet = False
    assert bench.job().park() == Outcome("running", "a thread of process 8 may still be in a call of the driver")
    assert bench.driver.calls == each("lock") + each("unlock")


def fail(bench: Bench, pid: int) -> None:
    raise DriverError(f"failed for {pid}", UNKNOWN_ERROR)


def end(bench: Bench, pid: int) -> None:
    del bench.driver.states[pid]
    raise DriverError(f"failed for {pid}", UNKNOWN_ERROR)


def lose(bench: Bench, pid: int) -> None:
    bench.driver.states[pid] = State.FAILED
    raise DriverError(f"lost {pid}", UNKNOWN_ERROR)


def end_another(bench: Bench, pid: int) -> None:
    """Another process of the job ends during the call."""
    bench.driver.states.pop(next(other for other in PIDS if other != pid), None)


FAILURES = [fail, end, lose, end_another]
JOBS = [("park", State.RUNNING), ("wake", State.CHECKPOINTED)]


def with_failures(op: str, state: State, failures: dict[int, Callable[[Bench, int], None]]) -> tuple[Bench, Outcome]:
    bench = Bench(state=state)

    def at(call: int, name: str, pid: int) -> None:
        if call in failures:
            failures[call](bench, pid)

    bench.driver.at = at
    job = bench.job()
    return bench, job.park() if op == "park" else job.wake()


def assert_consistent(bench: Bench, outcome: Outcome, failures: int) -> None:
    """No process is left locked, and none runs beside one that is parked, unless the outcome is that they are lost."""
    states = set(bench.driver.states.values())
    if outcome.result != "lost":
        assert states == {{"running": State.RUNNING, "parked": State.CHECKPOINTED}[outcome.result]}
    else:
        assert outcome.error
        assert failures > 1 or State.FAILED in states or not states or State.LOCKED in states
    calls = bench.driver.calls
    for at, (name, _) in enumerate(calls):
        if name == "unlock":  # after the first unlock nothing is restored
            assert "restore" not in [later for later, _ in calls[at:]]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize(("op", "state"), JOBS)
def test_one_failure_leaves_all_processes_in_one_state(
    op: str, state: State, call: int, failure: Callable[[Bench, int], None]
) -> None:
    bench, outcome = with_failures(op, state, {call: failure})
    assert_consistent(bench, outcome, 1)
    if failure is fail:
        # Only an unlock that fails leaves a process that neither runs nor is parked.
        expected = "running" if op == "park" else "parked" if call < 3 else "lost"
        assert (outcome.result, bool(outcome.error)) == (expected, True)
    if failure is lose:
        assert outcome.result == "lost"


@pytest.mark.parametrize("second", FAILURES)
@pytest.mark.parametrize("first", FAILURES)
@pytest.mark.parametrize(("op", "state"), JOBS)
def test_two_failures_never_leave_some_processes_parked_and_others_running(
    op: str, state: State, first: Callable[[Bench, int], None], second: Callable[[Bench, int], None]
) -> None:
    for i in range(6):
        for j in range(i + 1, 12):
            bench, outcome = with_failures(op, state, {i: first, j: second})
            assert_consistent(bench, outcome, 2)


def test_one_deadline_is_for_all_locks() -> None:
    bench = Bench()
    bench.driver.on_call = lambda: bench.sleep(0.25)
    assert bench.job(lock_ms=1000).park().result == "parked"
    assert bench.driver.timeouts == [1000, 750, 500]
    bench = Bench()
    bench.driver.on_call = lambda: bench.sleep(0.5)
    assert bench.job(lock_ms=1000).park() == Outcome("running", "process 9 was not idle within 1 s")
    assert bench.driver.calls == [("lock", 7), ("lock", 8), ("unlock", 7), ("unlock", 8)]


def test_a_process_that_is_busy_is_named() -> None:
    bench = Bench()

    def at(_: int, name: str, pid: int) -> None:
        if (name, pid) == ("lock", 8):
            raise DriverError("not ready", NOT_READY)

    bench.driver.at = at
    assert bench.job().park() == Outcome("running", "process 8 was not idle within 5 s")
    assert bench.driver.calls == [("lock", 7), ("lock", 8), ("unlock", 7)]


def test_no_process_is_checkpointed_after_the_deadline() -> None:
    bench = Bench()
    bench.driver.on_call = lambda: bench.sleep(0.5)
    assert bench.job(deadline_ms=1900).park() == Outcome("running", "not all processes were checkpointed within 1.9 s")
    assert bench.driver.calls == [*each("lock"), ("checkpoint", 7), ("restore", 7), *each("unlock")]


@pytest.mark.parametrize(("check", "calls"), [(0, []), (1, each("lock") + each("unlock"))])
def test_without_room_nothing_is_checkpointed(check: int, calls: list[tuple[str, int]]) -> None:
    bench = Bench()
    bench.full_at = check
    assert bench.job().park() == Outcome("running", "no room", is_unchanged=not calls)
    assert bench.driver.calls == calls


@pytest.mark.parametrize(("op", "state"), JOBS)
def test_a_process_that_cannot_execute_is_not_touched(op: str, state: State) -> None:
    bench = Bench(state=state)
    bench.targets[1].obstacle = "process 8 is stopped"
    job = bench.job()
    outcome = job.park() if op == "park" else job.wake()
    expected = {"park": ("running", True), "wake": ("parked", False)}[op]
    assert (outcome.result, outcome.is_unchanged, outcome.error) == (*expected, "process 8 is stopped")
    assert bench.driver.calls == []


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ((State.CHECKPOINTED,) * 3, Outcome("parked")),
        (
            (State.RUNNING, State.LOCKED, State.RUNNING),
            Outcome("running", "the state of process 8 is locked, not running"),
        ),
        ((State.RUNNING, State.FAILED, State.RUNNING), Outcome("lost", "the driver has failed to restore process 8")),
    ],
)
def test_processes_in_another_state_are_not_touched(states: tuple[State, ...], expected: Outcome) -> None:
    bench = Bench()
    bench.driver.states = dict(zip(PIDS, states, strict=True))
    assert bench.job().park() == expected
    assert bench.driver.calls == []


@pytest.mark.parametrize(
    ("others", "is_unchanged"),
    [(State.RUNNING, True), (State.UNKNOWN, True), (State.LOCKED, False), (State.CHECKPOINTED, False)],
)
def test_a_process_that_has_no_cuda_is_named(others: State, is_unchanged: bool) -> None:
    bench = Bench()
    bench.driver.states = {7: State.UNKNOWN, 8: State.RUNNING, 9: others}
    outcome = Outcome("running", "the state of process 7 is unknown, not running", is_unchanged)
    assert bench.job().park() == outcome


@pytest.mark.parametrize(("others", "is_unchanged"), [(State.RUNNING, True), (State.CHECKPOINTED, False)])
def test_a_state_that_the_driver_does_not_report_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, others: State, is_unchanged: bool
) -> None:
    bench = Bench(state=others)

    def state(pid: int) -> State:
        if pid == 7:
            raise DriverError("no state of 7", UNKNOWN_ERROR)
        return bench.driver.states[pid]

    monkeypatch.setattr(bench.driver, "state", state)
    assert bench.job().park() == Outcome("running", "no state of 7", is_unchanged)
    assert bench.driver.calls == []


def test_processes_that_have_ended_while_parked_do_not_keep_others_from_running() -> None:
    bench = Bench(state=State.CHECKPOINTED)
    del bench.driver.states[8]
    assert bench.job().wake() == Outcome("running")
    bench.driver.states.clear()
    assert bench.job().wake() == Outcome("lost", "all processes have ended")


@pytest.mark.parametrize("calls", range(7))
def test_a_job_that_ends_after_any_call_is_undone(calls: int) -> None:
    """A second process finds the states that the first one has left."""
    bench = Bench()
    for name, pid in (each("lock") + each("checkpoint"))[:calls]:
        getattr(bench.driver, name)(*((pid, 1000) if name == "lock" else (pid,)))
    outcome = bench.job().recover("the job has ended")
    assert (outcome.result, set(bench.driver.states.values())) == ("running", {State.RUNNING})
    assert outcome.error.startswith("the job has ended (processes: 7 ")


def test_a_recovery_waits_for_a_call_that_is_in_progress() -> None:
    bench = Bench(state=State.LOCKED)
    tries: list[int] = []

    def at(_: int, name: str, pid: int) -> None:
        tries.append(pid)
        if len(tries) < 4:
            raise DriverError("in progress", ILLEGAL_STATE)

    bench.driver.at = at
    assert bench.job().recover("ended").result == "running"
    assert tries == [7, 7, 7, 7, 8, 9]


def test_a_recovery_ends_if_a_call_stays_in_progress() -> None:
    bench = Bench(state=State.LOCKED)

    def at(*_: object) -> None:
        raise DriverError("in progress", ILLEGAL_STATE)

    bench.driver.at = at
    outcome = bench.job().recover("ended")
    assert (outcome.result, 9 < bench.seconds < 12) == ("lost", True)


def test_the_states_of_processes_have_names() -> None:
    bench = Bench()
    bench.driver.states = {7: State.LOCKED, 8: State.FAILED}
    assert bench.job().states() == {"7": "locked", "8": "failed", "9": "gone"}
