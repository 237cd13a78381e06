"""The moves of the charges of processes whose levels change, to new levels or to the levels of another cgroup.

The module runs in the agent's main loop, except published(). A parked process is not moved before it runs, because the
page of the process's own level makes the shim block calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Container, Iterable
from pathlib import Path

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.wakeup import Wakeup


def levels_at(root: Path, managed: Container[int], path: str) -> tuple[int, ...]:
    """Return the outermost LEVELS managed cgroups on a path, as in the kernel, innermost first."""
    return tuple(cgroup for cgroup in procfs.cgroup_ids(root, path) if cgroup in managed)[-abi.LEVELS :]


class Moves:
    """The moves of all processes. `managed`: the managed cgroups below `root`."""

    def __init__(self, ledger: Ledger, root: Path, managed: Container[int]) -> None:
        self._ledger, self._root, self._managed = ledger, root, managed
        self._wakeup = Wakeup()
        self._published: deque[tuple[set[int], int]] = deque()  # new levels, and the earlier processes_so_far()

    def fileno(self) -> int:
        """Return a descriptor that is readable when take_over_late() must be called."""
        return self._wakeup.fileno()

    def published(self, cgroups: set[int], so_far: int) -> None:
        """Record that every BPF program uses these levels from now on. Any thread may call this method.

        `so_far`: the number of entries of processes that had been created before the levels were put in force.
        """
        self._published.append((cgroups, so_far))
        self._wakeup.wake()

    def take_over_late(self) -> None:
        """Assign processes to new levels that the processes' entries lack.

        The kernel may compute the levels of a process before a new level is published, and create the entry of the
        process after take_over() has read the entries.
        """
        self._wakeup.clear()
        published = [self._published.popleft() for _ in range(len(self._published))]
        now = self._ledger.processes_so_far()
        late = {cgroup for cgroups, so_far in published if so_far != now for cgroup in cgroups}
        if late:
            self.take_over(late)

    def take_over(self, cgroups: Collection[int]) -> None:
        """Move the charges of processes into their new levels. Overhead (from NVML) follows at the next reconcile."""
        for pid, process in self._ledger.processes().items():
            levels = self._levels_of(pid)
            if levels and not set(levels).isdisjoint(cgroups):
                self._ledger.move(pid, process.generation, levels)

    def catch_up(self, pids: Iterable[int]) -> None:
        """Make the moves that had to wait until these processes run."""
        for pid in pids:
            self._ledger.parked.unmoved.discard(pid)
            process, levels = self._ledger.process(pid), self._levels_of(pid)
            if process is None or levels is None or levels == process.levels:
                continue
            if self._ledger.move(pid, process.generation, levels):
                self._ledger.new_epoch()

    def _levels_of(self, pid: int) -> tuple[int, ...] | None:
        """Return the levels that a process should have.

        The result is None if the process has ended or its cgroup lies outside this process's cgroup namespace.
        """
        path = procfs.cgroup_path(pid)
        return levels_at(self._root, self._managed, path) if path and not procfs.is_outside(path) else None
