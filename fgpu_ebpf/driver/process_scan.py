"""A scan of all processes of the host for files of libcuda and the shim, in the threads of the library workers.

A process can have any number of mappings, and a user any number of processes. Therefore each cgroup has its own jobs. A
job ends after SLICE_SECONDS and is charged to the cgroup's budget of processor time (`file_budget`). Processes that are
left out because the budget is used up are examined when the processes register, or when NVML shows that the processes
use a device.

This module runs in the agent's main thread, which does not wait for a process. `_group` and `_slice` run in a worker
thread.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

from fgpu_ebpf.driver.libraries import Job, Taken
from fgpu_ebpf.driver.library_search import Found
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.procmaps import File

log = logging.getLogger("fgpu.agent")
SLICE_SECONDS = 0.25
MOST_SECONDS = 60.0  # of one scan; processes that block the scan longer are left out


@dataclass
class Scanned:
    """The result of a scan.

    `pids`: the processes that existed at the start of the scan. `used`: the files that these processes map. `left_out`:
    processes whose mappings could not be read. `is_whole`: every process in `pids` has been read, or is in `left_out`.
    """

    pids: Sequence[int] = ()
    used: set[File] = field(default_factory=set)
    left_out: list[int] = field(default_factory=list)
    is_whole: bool = False


@dataclass(eq=False)
class _Look:
    """A running scan. `then`: called at the end of the scan. `open`: by cgroup, the processes still to be read."""

    then: Callable[[Scanned], None]
    began: float
    open: dict[str, Sequence[int]] = field(default_factory=dict)
    scanned: Scanned = field(default_factory=Scanned)


class HostScan:
    """Scans of the host, at most one at a time.

    Args:
        work: queues a job for a cgroup; returns False if the cgroup's budget is used up or its queue is full.
        owner_of: returns the cgroup to which work for a cgroup's processes is charged; called in a worker thread.
        read: reads the mappings of a process; called in a worker thread.
        see: called in the main thread with a process, the process's cgroup and the mapped files.
    """

    def __init__(
        self,
        work: Callable[[str, Job], bool],
        owner_of: Callable[[str], str],
        read: Callable[[int], Found],
        see: Callable[[int, str, Found], None],
    ) -> None:
        self._work, self._owner_of, self._read_one, self._see = work, owner_of, read, see
        self._look: _Look | None = None

    def begin(self, then: Callable[[Scanned], None]) -> None:
        """Start a scan, and call `then` with its result in the main thread.

        Do nothing if a scan is running that began less than MOST_SECONDS ago. End an older scan first. Processes that
        the older scan has not read are in `left_out` of the result of the older scan.
        """
        if self._look and monotonic() - self._look.began < MOST_SECONDS:
            return
        if self._look:
            self._give_up(self._look)
        look = self._look = _Look(then, monotonic(), {"": ()})
        if not self._queue(look, "", partial(self._group, look)):
            self._end(look)

    def _give_up(self, look: _Look) -> None:
        for pids in look.open.values():
            look.scanned.left_out.extend(pids)
        self._end(look)

    def _end(self, look: _Look) -> None:
        self._look = None
        look.then(look.scanned)

    def _queue(self, look: _Look, cgroup: str, job: Job) -> bool:
        return self._work(cgroup, partial(self._guarded, look, cgroup, job))

    def _guarded(self, look: _Look, cgroup: str, job: Job) -> Taken:
        """Run a job. A job that fails does not end the worker thread, and its scan does not wait for the job."""
        try:
            return job()
        except Exception as error:
            return partial(self._fail, look, cgroup, error)

    def _fail(self, look: _Look, cgroup: str, error: Exception) -> None:
        log.warning("processes of cgroup %r cannot be scanned: %s", cgroup, error)
        self._close(look, cgroup)

    def _close(self, look: _Look, cgroup: str) -> None:
        """End the work for a cgroup in this scan."""
        look.scanned.left_out.extend(look.open.pop(cgroup, ()))
        if not look.open and look is self._look:
            self._end(look)

    # -- jobs, and their results in the main thread

    def _group(self, look: _Look) -> Taken:
        inside: dict[str, list[int]] = defaultdict(list)
        for pid in procfs.pids():
            inside[procfs.cgroup_path(pid) or "/"].append(pid)
        groups: dict[str, list[int]] = defaultdict(list)
        for path, pids in inside.items():
            if not procfs.is_outside(path):  # the agent cannot limit cgroups outside its own cgroup namespace
                groups[self._owner_of(path)] += pids
        return partial(self._take_groups, look, groups)

    def _take_groups(self, look: _Look, groups: Mapping[str, Sequence[int]]) -> None:
        look.scanned.pids = [pid for pids in groups.values() for pid in pids]
        look.scanned.is_whole = True
        look.open |= groups
        for cgroup in groups:
            self._read(look, cgroup)
        self._close(look, "")

    def _read(self, look: _Look, cgroup: str) -> None:
        if not self._queue(look, cgroup, partial(self._slice, look, cgroup, look.open[cgroup])):
            self._close(look, cgroup)

    def _slice(self, look: _Look, cgroup: str, pids: Sequence[int]) -> Taken:
        found: dict[int, Found] = {}
        end = monotonic() + SLICE_SECONDS
        for pid in pids:
            found[pid] = self._read_one(pid)
            if monotonic() > end:
                break
        return partial(self._take_slice, look, cgroup, found)

    def _take_slice(self, look: _Look, cgroup: str, found: Mapping[int, Found]) -> None:
        if cgroup not in look.open:  # the scan has ended without this cgroup
            return
        look.open[cgroup] = look.open[cgroup][len(found) :]
        for pid, its in found.items():
            if its.files is None and procfs.has_memory(pid):
                look.scanned.left_out.append(pid)
            look.scanned.used |= {(one.dev, one.ino) for one in its.files or ()}
            self._see(pid, cgroup, its)
        if look.open[cgroup]:
            self._read(look, cgroup)
        else:
            self._close(look, cgroup)
