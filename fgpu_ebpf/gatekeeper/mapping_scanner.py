"""Worker threads that list the libcuda and shim files that a process maps, and check breakpoints in mapped memory.

Reading /proc/PID/maps takes the process's mmap lock, and reading /proc/PID/mem loads the process's pages. Both readings
may block. A process that cannot be read blocks one worker thread and its tenant's queue (`linux.worker_threads`), but
not the gatekeeper's main loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fgpu_ebpf.gatekeeper.connections import Connection
from fgpu_ebpf.linux import breakpoints
from fgpu_ebpf.linux.procmaps import File
from fgpu_ebpf.linux.worker_threads import Workers


class MappingScanner:
    """The worker threads that read the mappings of processes.

    The threads call `wake` when take() has something to return. `check` is Ledger.file_check.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.check: Callable[[int, int], int | None] = lambda *_: None
        self._workers: Workers[int, Connection, Mapping[File, int]] = Workers(
            self._read, lambda connection: connection.here, wake
        )
        self.due_ns, self.go = self._workers.due_ns, self._workers.go

    def want(self, connection: Connection) -> None:
        """Queue a connection's process for the next go(), unless its tenant has too many queued processes."""
        connection.reading = self._workers.want(connection.tenant, connection)

    def take(self) -> list[tuple[Connection, int]]:
        """Return the connections whose processes were scanned since the last call, with the processor time."""
        found = self._workers.take()
        for done in found:
            done.job.files, done.job.reading = done.result, False
        return [(done.job, done.took_ns) for done in found]

    def _read(self, connection: Connection) -> Mapping[File, int]:
        return breakpoints.of_process(connection.pid, self.check)
