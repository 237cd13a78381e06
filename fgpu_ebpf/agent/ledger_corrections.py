"""The correction of overheads in the ledger: the memory that NVML shows for a process beyond its witnessed bytes.

This module runs in the reconcile thread. The charge of an idle process is set to the bytes that NVML shows, plus pool
bytes that the driver has freed (see overhead_for()). While a process is not idle (one of its threads is between an
admission and its settlement, or in a witnessed call), only bytes that are certainly missing are added.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from fgpu_ebpf.check import has_host_pids
from fgpu_ebpf.driver.device_sample import Sample
from fgpu_ebpf.driver.nvml import Nvml
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs

# The memory of a process with a context counts as gone after this many passes in a row in which NVML does not list the
# process and fewer bytes are in use outside all rows than probes have recorded for the process.
GONE = 3

Drift = dict[tuple[int, int], int]  # (pid, device) -> ledger minus NVML, in bytes
_Life = tuple[int, int, int]  # pid, generation, device


class Corrections:
    """The correction of overheads.

    `levels` returns the levels of a cgroup path, for processes that no probe has recorded.
    """

    def __init__(self, nvml: Nvml, ledger: Ledger, levels: Callable[[str], tuple[int, ...]]) -> None:
        self._nvml = nvml
        self._ledger = ledger
        self._levels = levels
        self._gone: dict[_Life, int] = {}  # by process and device: the number of passes in a row, see GONE
        # The number of ended contexts at the last exact setting, and the part of the overhead below 0:
        # see _correct.
        self._exact: dict[_Life, tuple[int, int]] = {}

    def mark(self, device: int, processes: Mapping[int, Process]) -> None:
        """Reset the peaks of processes that are not idle, before a query of NVML."""
        for tgid, process in processes.items():
            if not process.quiet:
                self._ledger.mark(tgid, process.generation, device)

    def look(self, device: int, sample: Sample, ended: Mapping[int, int], drift: Drift) -> bool:
        """Correct all processes of a device once.

        Return True if some processes were not idle, so that a retry may be exact.

        The kernel refuses the correction of a process if a charge, a release, an admission or a call of the process has
        begun since the process was read.

        Args:
            ended: the bytes of each row, by pid, that belong to ended processes.
            drift: a dict that gets ledger minus NVML for each process.
        """
        known, is_unquiet = sample.processes, False
        self._look_for_the_unnamed(device, sample)
        for tgid, process in known.items():
            if process.is_parked:  # the driver moves the memory for the parker, so NVML may show all of it or none
                if tgid not in sample.rows and (process.parked[device] or not process.bytes[device]):
                    drift[tgid, device] = 0
                continue
            held = self._held(tgid, process, device, sample)
            if held is None:
                continue
            if process.quiet:
                self._count_context(tgid, process, device, sample, ended)
            held = max(process.handles_in_no_row(device), held - ended.get(tgid, 0))
            if not process.bytes[device] and not held:
                drift[tgid, device] = 0
            elif not process.quiet or not self._correct(tgid, process, device, held, drift):
                is_unquiet = True
                self._raise(tgid, process, device, held, drift)
            if tgid not in sample.rows and not process.contexts[device] and process.bytes[device]:
                drift.pop((tgid, device), None)  # its handles are in no row: the driver's bytes are unknown
        self._adopt(sample, ended)
        return is_unquiet

    def _held(self, tgid: int, process: Process, device: int, sample: Sample) -> int | None:
        """Return the bytes that a process holds according to NVML, or None if the charge must not change.

        NVML lists only processes with a context. A process that has a context and is not listed keeps its charge until
        its memory counts as gone, as after the loss or a reset of the device. A process without a context keeps its
        handles and pools, which are on the device, in no row. A process without a recorded context keeps its other
        witnessed bytes until these bytes count as gone, because a process that is older than the probes may have a
        context that no probe has recorded.
        """
        if tgid in sample.rows:
            return sample.rows[tgid]
        if process.bytes[device] and not _is_alive(tgid):
            return None
        is_gone = self._gone.get((tgid, process.generation, device), 0) >= GONE
        if process.recorded_contexts(device):
            return 0 if is_gone else None
        charged = 0 if is_gone else process.bytes[device] - process.managed[device]
        return max(0, min(process.witnessed(device), max(_outlasting(process, device), charged)))

    def _count_context(
        self, tgid: int, process: Process, device: int, sample: Sample, ended: Mapping[int, int]
    ) -> None:
        """Tell the ledger of a context without a recorded creation, or of the end of such a context.

        NVML lists only processes with a context. The kernel refuses both if the process has changed since the reading.
        A row that may belong to an ended process with the same pid shows no context.
        """
        if tgid not in sample.rows:
            if process.is_unseen(device):
                self._ledger.context_gone(tgid, process.generation, device, process.changes)
        elif not process.contexts[device] and tgid not in ended:
            self._ledger.context_seen(tgid, process.generation, device, process.changes)

    def _look_for_the_unnamed(self, device: int, sample: Sample) -> None:
        """Count, for each unlisted process, the passes in a row in which memory of its contexts is not in use.

        The memory is not in use if fewer bytes are in use beyond all rows than probes counted for the process.
        """
        unnamed = {
            tgid: process for tgid, process in sample.processes.items()
            if (process.recorded_contexts(device) or process.witnessed(device) > _outlasting(process, device))
            and tgid not in sample.rows and not process.is_parked
        }  # fmt: skip
        left = self._left(device, sample) if unnamed else None
        counts = {life: n for life, n in self._gone.items() if life[2] != device}
        for tgid, process in unnamed.items():
            life = (tgid, process.generation, device)
            if left is not None and left < process.witnessed(device):
                counts[life] = self._gone.get(life, 0) + 1
        self._gone = counts

    def _left(self, device: int, sample: Sample) -> int | None:
        """Return the bytes in use on a device that no row has, or None if NVML does not report some of the bytes."""
        known = [bytes_ for bytes_ in sample.rows.values() if bytes_ is not None]
        in_use = self._nvml.taken_bytes(device)
        return None if in_use is None or len(known) < len(sample.rows) else in_use - sum(known)

    def _correct(self, tgid: int, process: Process, device: int, held: int, drift: Drift) -> bool:
        """Set the overhead of a process on a device, and record the remaining drift.

        The result is whether the process now has this overhead. The result is False if the kernel refused the change.

        If a context was destroyed while other contexts remained, the overhead is set exactly, because no probe has
        recorded which memory was freed with the context. The overhead may then be below 0. While the process has a
        context, later overheads may be as low as this one.
        """
        exact, life = held - process.witnessed(device), (tgid, process.generation, device)
        contexts_ended, gone = self._exact.get(life, (0, 0))
        has_ended = process.ended[device] != contexts_ended
        gone = gone if process.contexts[device] else 0
        target = exact if has_ended else overhead_for(exact, process.pool[device], gone)
        before = process.overhead[device]
        done = target == before or self._ledger.overhead(tgid, process.generation, device, target, process.changes)
        if done and has_ended:
            self._exact[life] = process.ended[device], min(0, exact)
        drift[tgid, device] = (target if done else before) - exact
        return done

    def _raise(self, tgid: int, process: Process, device: int, held: int, drift: Drift) -> None:
        """Charge the missing bytes of a process that is not idle: the bytes in the row above the peak since mark()."""
        now = self._ledger.process(tgid)
        if now is None or now.generation != process.generation or now.is_parked:
            return
        managed = min(process.managed[device], now.managed[device])
        witnessed = max(now.peak[device], now.bytes[device]) - now.overhead[device] - managed
        more = held - witnessed - now.overhead[device]
        if more > 0 and self._ledger.raise_overhead(tgid, now.generation, device, more):
            drift[tgid, device] = 0

    def _adopt(self, sample: Sample, ended: Mapping[int, int]) -> None:
        """Add to the ledger all processes of managed cgroups that hold memory and that no probe has recorded.

        Exiting processes are not added, because the driver takes 0.1 s to free their memory, and an exiting process
        bypasses nothing. If the agent is outside the host's pid namespace, no process is added, because NVML's pids
        differ from the kernel's pids.
        """
        if not has_host_pids():
            return
        for pid, held in sample.rows.items():
            if pid in sample.processes or held is None or held <= ended.get(pid, 0):
                continue
            path = procfs.cgroup_path(pid)
            levels = self._levels(path) if path else ()
            if levels and not procfs.ended(pid):
                self._ledger.move(pid, 0, levels)

    def forget_ended(self, living: Mapping[int, Process]) -> None:
        """Remove the records of all processes that are not in `living`."""
        lives = {(tgid, process.generation) for tgid, process in living.items()}
        self._exact = {life: n for life, n in self._exact.items() if life[:2] in lives}


def overhead_for(exact: int, pool: int, gone: int = 0) -> int:
    """Return the overhead with which the charge of a process equals the bytes that NVML shows.

    Pool bytes that the driver has freed are an exception. The shim uses these bytes again without a request, so the
    bytes stay charged until the shim releases them.

    Args:
        exact: the bytes that NVML shows minus the witnessed bytes.
        pool: the bytes of the process's pools.
        gone: the part of the overhead below 0, for memory that was freed with contexts. The value is 0 or less.
    """
    return max(exact, min(gone, exact + pool))


def _outlasting(process: Process, device: int) -> int:
    """Return the witnessed bytes that outlive contexts."""
    return process.handles[device] + process.pool[device]


def _is_alive(tgid: int) -> bool:
    return os.path.exists(f"/proc/{tgid}")
