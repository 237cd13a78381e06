"""Reads, in threads, which libcuda and shim files callers have mapped, and whether those have our breakpoints there.

Reading /proc/PID/maps or /proc/PID/mem can wait for the process. A process that cannot be read holds up one thread and
its tenant's queue (`workers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fgpu_ebpf import breakpoints
from fgpu_ebpf.callers import Caller
from fgpu_ebpf.mappings import File
from fgpu_ebpf.workers import Workers


class Readers:
    """All readers. `ring` is called by a thread when there is something for `take`; `check` is Ledger.file_check."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self.check: Callable[[int, int], int | None] = lambda *_: None
        self._workers: Workers[int, Caller, Mapping[File, int]] = Workers(self._read, lambda caller: caller.here, ring)
        self.due_ns, self.go = self._workers.due_ns, self._workers.go

    def want(self, caller: Caller) -> None:
        """Have this caller's mappings read when `go` is called next, unless its tenant has too many callers."""
        caller.reading = self._workers.want(caller.tenant, caller)

    def take(self) -> list[tuple[Caller, int]]:
        """The callers that have been read since, and the processor time that each took."""
        found = self._workers.take()
        for done in found:
            done.job.files, done.job.reading = done.result, False
        return [(done.job, done.took_ns) for done in found]

    def _read(self, caller: Caller) -> Mapping[File, int]:
        return breakpoints.of_process(caller.pid, self.check)
