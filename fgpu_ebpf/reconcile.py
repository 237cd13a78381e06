"""NVML's truth, entered in the ledger.

Owns: the thread that asks NVML and corrects what only NVML knows (contexts, modules, rounding), adopts processes that
the kernel never saw, and sweeps what dead ones left. Never: holds up the agent: NVML may hang, and then the ledger goes
on from its probes, and the age of the last answer is a metric.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fgpu_ebpf import procfs
from fgpu_ebpf.devices import Nvml
from fgpu_ebpf.ledger import Ledger, Process

PERIOD_SECONDS = 0.5
RETRIES = 3


@dataclass(frozen=True, slots=True)
class Truth:
    """What NVML said last: bytes by device and host pid, and the drift of each process that was quiet."""

    at: float
    used: Mapping[int, int | None] = field(default_factory=dict)
    held: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    drift: Mapping[tuple[int, int], int] = field(default_factory=dict)


class Reconciler:
    """Runs on its own thread from start() to stop()."""

    def __init__(self, nvml: Nvml, ledger: Ledger, levels: Callable[[str], tuple[int, ...]]) -> None:
        self._nvml = nvml
        self._ledger = ledger
        self._levels = levels
        self._wake = threading.Event()
        self._stopping = False
        self._seen: set[tuple[int, int]] = set()
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)
        self.truth = Truth(0.0)
        self.failure = ""

    def start(self) -> None:
        """Begins; the first look is at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends, unless NVML hangs: then the thread is left behind."""
        self._stopping = True
        self._wake.set()
        self._thread.join(2.0)

    def nudge(self) -> None:
        """Looks now instead of at the end of the period."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.look()
                self.failure = ""
            except Exception as error:  # a thread that ends would stop the truth; the next look may work
                self.failure = f"{type(error).__name__}: {error}"
            self._wake.wait(PERIOD_SECONDS)
            self._wake.clear()

    def look(self) -> None:
        """One reconcile: adopt, correct, sweep, and tell."""
        drift: dict[tuple[int, int], int] = {}
        used: dict[int, int | None] = {}
        held: dict[int, dict[int, int]] = {}
        for device in (d.index for d in self._nvml.devices):
            used[device] = self._nvml.used_bytes(device)
            for _ in range(RETRIES):
                sample, unsettled = self._correct(device, drift)
                held[device] = sample
                if not unsettled:
                    break
        self._sweep()
        self.truth = Truth(time.monotonic(), used, held, drift)

    def _correct(self, device: int, drift: dict[tuple[int, int], int]) -> tuple[dict[int, int], bool]:
        """Sets every quiet process's overhead to what NVML shows beyond what was witnessed.

        Between the read of a process and its correction nothing may be charged, released, admitted or in a call: the
        kernel refuses the correction where `changes` has moved on.
        """
        before = self._ledger.processes()
        busy = self._ledger.busy()
        sample = self._nvml.process_bytes(device)
        if sample is None:
            return {}, False
        unsettled = False
        for tgid, process in before.items():
            held = sample.get(tgid)
            if held is None and not process.bytes[device]:
                continue
            if held is None and not _alive(tgid):
                continue
            if tgid in busy or not process.quiet:
                unsettled = True
                continue
            unsettled |= not self._correct_process(tgid, process, device, held or 0, drift)
        self._adopt(sample, before)
        return sample, unsettled

    def _correct_process(
        self, tgid: int, process: Process, device: int, held: int, drift: dict[tuple[int, int], int]
    ) -> bool:
        """Sets one overhead; the drift that is left is told either way."""
        exact = held - process.witnessed(device)
        target = overhead_for(exact, process.pool[device])
        before = process.overhead[device]
        done = target == before or self._ledger.overhead(tgid, process.generation, device, target, process.changes)
        drift[tgid, device] = (target if done else before) - exact
        return done

    def _adopt(self, sample: Mapping[int, int], known: Mapping[int, Process]) -> None:
        """Enters processes of managed cgroups that hold memory and that the kernel never saw."""
        for pid in sample:
            if pid in known:
                continue
            path = procfs.cgroup_path(pid)
            levels = self._levels(path) if path else ()
            if levels:
                self._ledger.move(pid, 0, levels)

    def _sweep(self) -> None:
        """Reaps processes whose end nobody told, and deletes what ended ones left."""
        now = {(tgid, p.generation) for tgid, p in self._ledger.processes().items()}
        for tgid, generation in now:
            if not _alive(tgid):
                self._ledger.reap(tgid, generation)
        if self._seen - now:
            self._ledger.sweep()
        self._seen = now


def overhead_for(exact: int, pool: int) -> int:
    """The overhead that makes the ledger what NVML shows, but for pool bytes that the driver has given back meanwhile:

    the shim spends those again without asking, so they stay charged until it gives them back itself.
    """
    return max(exact, min(0, exact + pool))


def _alive(tgid: int) -> bool:
    return Path(f"/proc/{tgid}").exists()
