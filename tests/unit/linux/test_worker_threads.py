"""Tests of worker threads on a host without room for another thread."""

from __future__ import annotations

import _thread
import threading
import time

import pytest

from fgpu_ebpf.linux import worker_threads
from fgpu_ebpf.linux.worker_threads import STALLED_NS, Workers


def test_a_thread_that_cannot_be_started_is_due_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    workers: Workers[int, int, int] = Workers(lambda job: job, lambda _: True, lambda: None)
    workers.want(1, 1)
    assert workers.due_ns() == 0
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", fail)
        before_ns = time.monotonic_ns()
        with pytest.raises(OSError, match="can't start new thread"):
            workers.go()
    due_ns = workers.due_ns()
    assert due_ns is not None
    assert due_ns >= before_ns + STALLED_NS
    while not (done := workers.take()):
        workers.go()
    assert [one.result for one in done] == [1]


def test_the_results_of_more_jobs_than_a_queue_holds_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_threads, "MOST_WANTED", 4)
    assert worker_threads.finished(lambda job: -job, range(100), 60, 60) == {job: -job for job in range(100)}
    assert worker_threads.finished(lambda job: -job, [], 60, 60) == {}


def test_slow_jobs_are_waited_for_as_long_as_jobs_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_threads, "MOST_THREADS", 1)
    jobs = range(100)
    assert worker_threads.finished(lambda job: time.sleep(0.01) or job, jobs, 0.5, 60) == {job: job for job in jobs}


def test_slow_jobs_are_waited_for_at_most_a_total_time() -> None:
    goes_on = threading.Event()
    try:
        assert worker_threads.finished(lambda job: job == 1 or goes_on.wait(), [1, 2], 3600, 0.2) == {1: True}
        assert worker_threads.finished(lambda _: goes_on.wait(), [2], 3600, 0.2) == {}
    finally:
        goes_on.set()
