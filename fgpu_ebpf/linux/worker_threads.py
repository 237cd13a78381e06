"""Worker threads for jobs that can block on a process or a file of a tenant, so that no main loop blocks.

Each job has an owner. Jobs of one owner are done one after the other, so a job that hangs blocks one thread and the
owner's queue. Jobs of other owners get other threads. A few threads run as long as jobs finish. More threads are
started only if no job has finished for STALLED_NS.

The jobs of the gatekeeper read mappings of processes. The jobs of the agent examine files of libcuda. `want`, `due_ns`,
`go` and `take` are called in the main loop. `work` runs in the worker threads and must not raise.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import islice
from time import monotonic_ns, thread_time_ns
from typing import Generic, TypeVar

from fgpu_ebpf.linux import threads

MOST_THREADS, MORE_THREADS, MOST_AT_ONCE, MOST_WANTED, MOST_WANTED_ALL = 64, 8, 16, 1024, 1 << 16
STALLED_NS, WAKE_NS = 2_000_000, 1_000_000

Owner = TypeVar("Owner", bound=Hashable)
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Done(Generic[Owner, Job, Result]):
    """A finished job with its result. `took_ns`: the processor time that the job used, in nanoseconds."""

    owner: Owner
    job: Job
    result: Result
    took_ns: int


class Workers(Generic[Owner, Job, Result]):
    """A pool of threads that do `work` for each job.

    Args:
        work: does one job and returns its result.
        wanted: returns whether a job still has to be done. Other jobs are dropped.
        wake: called by a thread when take() has something to return.
        most: how many jobs of one owner may be queued.
        nice: the nice level of the threads, if not 0.
        few: how many threads are started without waiting for the running threads.
    """

    def __init__(
        self, work: Callable[[Job], Result], wanted: Callable[[Job], bool], wake: Callable[[], None],
        most: int = MOST_WANTED, nice: int = 0, few: int = 1,
    ) -> None:  # fmt: skip
        self._work, self._is_wanted, self._wake, self._most, self._nice, self._few = (
            work, wanted, wake, most, nice, few
        )  # fmt: skip
        self._wanted: dict[Owner, deque[Job]] = {}
        self._queued = 0
        self._busy: set[Owner] = set()  # owners with jobs in `_jobs` or in a thread; their other jobs stay in `_wanted`
        self._jobs: deque[tuple[Owner, list[Job]]] = deque()
        self._done: deque[Done[Owner, Job, Result]] = deque()
        self._finished: deque[Owner] = deque()
        self._ended: deque[None] = deque()  # one entry for each thread that has ended
        self._active = 0
        self._moved_ns = 0  # when a thread was last started, or take() last returned a job
        self._retry_ns = 0  # when a thread may be started again after a failure

    # -- in the loop

    def want(self, owner: Owner, job: Job) -> bool:
        """Queue a job, which a later go() starts. Return False if a full queue rejects the job."""
        wanted = self._wanted.setdefault(owner, deque())
        if len(wanted) >= self._most:
            self._leave_out_unwanted(wanted)
        if len(wanted) >= self._most or self._queued >= MOST_WANTED_ALL:
            return False
        wanted.append(job)
        self._queued += 1
        self._line_up(owner)
        return True

    def _leave_out_unwanted(self, wanted: deque[Job]) -> None:
        kept = list(filter(self._is_wanted, wanted))
        self._queued -= len(wanted) - len(kept)
        wanted.clear()
        wanted.extend(kept)

    def _line_up(self, owner: Owner) -> None:
        wanted = self._wanted.get(owner)
        if not wanted or owner in self._busy:
            return
        self._busy.add(owner)
        jobs = [wanted.popleft() for _ in range(min(MOST_AT_ONCE, len(wanted)))]
        self._queued -= len(jobs)
        self._jobs.append((owner, jobs))
        if not wanted:
            del self._wanted[owner]

    def due_ns(self) -> int | None:
        """Return when go() should be called, in nanoseconds of CLOCK_MONOTONIC; None: go() has nothing to do."""
        if not self._jobs or self._active >= MOST_THREADS:
            return None
        return self._moved_ns + STALLED_NS if self._active >= self._few else self._retry_ns

    def go(self) -> None:
        """Start a thread if fewer than `few` threads run, or several threads if jobs hang. Raise OSError on failure."""
        due_ns = self.due_ns()
        if due_ns is None or monotonic_ns() < due_ns:
            return
        self._moved_ns = monotonic_ns()
        more = min(MORE_THREADS, len(self._jobs), MOST_THREADS - self._active) if self._active >= self._few else 1
        for _ in range(more):
            try:
                threads.start(self._run)
            except OSError:
                self._retry_ns = monotonic_ns() + STALLED_NS
                raise
            self._active += 1

    def take(self) -> list[Done[Owner, Job, Result]]:
        """Return the jobs that have finished since the last call, and queue the next jobs of their owners."""
        found = []
        while self._done:
            found.append(self._done.popleft())
        if found:
            self._moved_ns = monotonic_ns()
        while self._finished:
            owner = self._finished.popleft()
            self._busy.discard(owner)
            self._line_up(owner)
        while self._ended:
            self._ended.popleft()
            self._active -= 1
        return found

    # -- in a thread

    def _run(self) -> None:
        if self._nice:
            os.setpriority(os.PRIO_PROCESS, _thread.get_native_id(), self._nice)
        woken_ns = monotonic_ns()
        try:
            while self._jobs:
                with contextlib.suppress(IndexError):  # another thread has taken the job
                    self._do(*self._jobs.popleft())
                if monotonic_ns() - woken_ns > WAKE_NS:
                    woken_ns = monotonic_ns()
                    self._wake()
        finally:
            self._ended.append(None)
            self._wake()

    def _do(self, owner: Owner, jobs: list[Job]) -> None:
        try:
            for job in filter(self._is_wanted, jobs):
                began_ns = thread_time_ns()
                result = self._work(job)
                self._done.append(Done(owner, job, result, thread_time_ns() - began_ns))
        finally:
            self._finished.append(owner)


def finished(
    work: Callable[[Owner], Result], owners: Iterable[Owner], seconds: float, most: float
) -> dict[Owner, Result]:
    """Do one job for each owner, and wait until all jobs have finished.

    Args:
        work: see Workers.
        owners: the owners of the jobs.
        seconds: the call ends if no job has finished in this time.
        most: the call ends after this time.

    Returns:
        The results of the jobs that have finished. A thread that blocks ends without another job.

    Raises:
        OSError: no thread can be started.
    """
    found: dict[Owner, Result] = {}
    woken, remaining, pause_ns = threading.Event(), iter(owners), int(seconds * 1e9)
    last_ns = monotonic_ns() + int(most * 1e9)
    ends_ns = min(monotonic_ns() + pause_ns, last_ns)
    workers: Workers[Owner, Owner, Result] = Workers(work, lambda _: monotonic_ns() < ends_ns, woken.set)
    open_jobs = 0
    while monotonic_ns() < ends_ns:
        for owner in islice(remaining, MOST_WANTED - open_jobs):
            open_jobs += workers.want(owner, owner)
        if not open_jobs:
            break
        workers.go()
        woken.wait(min(STALLED_NS, max(0, ends_ns - monotonic_ns())) / 1e9)
        woken.clear()
        if done := workers.take():
            ends_ns = min(monotonic_ns() + pause_ns, last_ns)
        found |= {one.owner: one.result for one in done}
        open_jobs -= len(done)
    return found
