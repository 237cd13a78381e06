"""Threads that read which files processes have mapped: to read that can wait for the process, and nobody waits with it.

Owns: the threads, at most 64, and who is to be read next: of a tenant, one at a time. Never: judges what was read. When
it fails: a process whose mappings hang keeps one thread and its tenant's turn; the next in line get another thread.
"""

from __future__ import annotations

import _thread
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns, thread_time_ns

from fgpu_ebpf import procfs
from fgpu_ebpf.callers import Caller

MOST_READERS, MORE_READERS, MOST_AT_ONCE, MOST_WANTED = 64, 8, 16, 1024
STALLED_NS, RING_NS = 2_000_000, 1_000_000


@dataclass(frozen=True, slots=True)
class Read:
    """What a caller has mapped, and what it took of the processor to find out."""

    caller: Caller
    files: frozenset[tuple[int, int]]
    took_ns: int


class Readers:
    """All readers. `ring` is called by a thread when there is something for `take`."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._wanted: dict[int, deque[Caller]] = {}
        self._busy: set[int] = set()  # tenants in `_jobs` or at a thread: the rest of theirs stays in `_wanted`
        self._jobs: deque[tuple[int, list[Caller]]] = deque()
        self._found: deque[Read] = deque()
        self._finished: deque[int] = deque()  # tenants, and below threads
        self._ended: deque[None] = deque()
        self._active = 0
        self._moved_ns = 0  # when something was last begun or done

    # -- in the loop

    def want(self, caller: Caller) -> None:
        """Have this caller's mappings read when `go` is called next."""
        wanted = self._wanted.setdefault(caller.tenant, deque())
        if len(wanted) >= MOST_WANTED:  # its tenant's turn hangs, and most of these have gone
            wanted = self._wanted[caller.tenant] = deque(c for c in wanted if c.here)
        wanted.append(caller)
        self._line_up(caller.tenant)

    def _line_up(self, tenant: int) -> None:
        wanted = self._wanted.get(tenant)
        if not wanted or tenant in self._busy:
            return
        self._busy.add(tenant)
        self._jobs.append((tenant, [wanted.popleft() for _ in range(min(MOST_AT_ONCE, len(wanted)))]))
        if not wanted:
            del self._wanted[tenant]

    def due_ns(self) -> int | None:
        """When `go` should be called; None: it has nothing to do."""
        if not self._jobs or self._active >= MOST_READERS:
            return None
        return self._moved_ns + STALLED_NS if self._active else 0

    def go(self) -> None:
        """See that threads are at work: one, or more where those that are hang. Raises OSError: no thread to be had."""
        due_ns = self.due_ns()
        if due_ns is None or monotonic_ns() < due_ns:
            return
        self._moved_ns = monotonic_ns()
        for _ in range(min(MORE_READERS, len(self._jobs), MOST_READERS - self._active) if self._active else 1):
            try:
                _thread.start_new_thread(self._work, ())  # threading would wait until it runs
            except RuntimeError as error:
                raise OSError(str(error)) from error
            self._active += 1

    def take(self) -> list[Read]:
        """What was read since."""
        found = []
        while self._found:
            found.append(self._found.popleft())
        if found:
            self._moved_ns = monotonic_ns()
        while self._finished:
            tenant = self._finished.popleft()
            self._busy.discard(tenant)
            self._line_up(tenant)
        while self._ended:
            self._ended.popleft()
            self._active -= 1
        return found

    # -- in a thread

    def _work(self) -> None:
        rung_ns = monotonic_ns()
        try:
            while self._jobs:
                with contextlib.suppress(IndexError):  # another was faster
                    self._read(*self._jobs.popleft())
                if monotonic_ns() - rung_ns > RING_NS:
                    rung_ns = monotonic_ns()
                    self._ring()
        finally:
            self._ended.append(None)
            self._ring()

    def _read(self, tenant: int, callers: list[Caller]) -> None:
        try:
            for caller in (c for c in callers if c.here):
                began_ns = thread_time_ns()
                files = procfs.cuda_files(caller.pid)
                self._found.append(Read(caller, files, thread_time_ns() - began_ns))
        finally:
            self._finished.append(tenant)
