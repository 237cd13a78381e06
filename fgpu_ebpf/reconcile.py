"""NVML's truth, entered in the ledger.

Owns: the thread that asks NVML and corrects what only NVML knows (contexts, modules, rounding), adopts processes that
the kernel never saw, and sweeps what dead ones left. Never: holds up the agent: NVML may hang, and then the ledger goes
on from its probes, and the age of the last answer is a metric.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from fgpu_ebpf import pages, procfs, xids
from fgpu_ebpf.audit import Audit, Verdict
from fgpu_ebpf.bell import Bell
from fgpu_ebpf.checks import Check
from fgpu_ebpf.devices import Nvml
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.processes import Process

PERIOD_SECONDS = 0.5
DEVICE_SECONDS = 1.0  # what a whole device holds is for people
RETRIES = 3
STALE_SECONDS = 5.0  # ten looks
GONE = 3  # looks in a row at which a process with a context is not named, nor its memory in use
NEVER_QUIET = 9  # looks in a row at which a process was in the middle of something
_NOBODY_SAYS = {0: None}

Sample = Mapping[int, int | None]  # host pid -> bytes on one device


@dataclass(frozen=True, slots=True)
class Truth:
    """What NVML said last: bytes by device and host pid (None: "N/A"), and the drift of each process compared.

    `turns`: who does not keep to them. `answered`: when NVML last did, device by device, on the monotonic clock.
    `failure`: why the last look has none. `processes`: those of the ledger, just before. `xids`: what devices reported,
    of those of which NVML tells it.
    """

    answered: Mapping[int, float] = field(default_factory=dict)
    used: Mapping[int, int | None] = field(default_factory=dict)
    held: Mapping[int, Sample] = field(default_factory=dict)
    drift: Mapping[tuple[int, int], int] = field(default_factory=dict)
    turns: Verdict = field(default_factory=Verdict)
    failure: str = ""
    processes: Mapping[int, Process] = field(default_factory=dict)
    xids: Mapping[int, xids.Reported] = field(default_factory=dict)

    def pids(self) -> set[int]:
        """Who holds memory."""
        return {pid for held in self.held.values() for pid in held}

    def strangers(self) -> set[int]:
        """Those of them that the ledger does not know to have the shim."""
        seen = (pid for pid, process in self.processes.items() if process.flags & pages.Seen.SHIM)
        return self.pids().difference(seen)


def check(ages: Mapping[int, float | None], failure: str) -> Check:
    """That NVML answers: seconds since it did by device; None: never."""
    stale = {index: age for index, age in ages.items() if age is None or age > STALE_SECONDS}
    said = ", ".join(f"gpu {i} {'never' if age is None else f'{age:.1f} s ago'}" for i, age in sorted(stale.items()))
    if stale or failure:
        text = f"NVML answered for {said}" if stale else "NVML answered"
        return Check(
            "reconcile", False, text + (f"; {failure}" if failure else ""), "nvidia-smi: does the driver answer?"
        )
    return Check("reconcile", True, f"NVML answered {max(filter(None, ages.values()), default=0.0):.1f} s ago")


class Reconciler:
    """Runs on its own thread from start() to stop()."""

    def __init__(
        self,
        nvml: Nvml,
        ledger: Ledger,
        levels: Callable[[str], tuple[int, ...]],
        ignored_xids: Collection[int] = xids.OF_PROGRAMS,
    ) -> None:
        self._nvml = nvml
        self._ledger = ledger
        self._levels = levels
        self._wake = threading.Event()
        self._bell = Bell()
        self._stopping = False
        self._known: Mapping[int, Process] = {}
        self._used_at = -DEVICE_SECONDS
        self._audit = Audit(nvml.process_percent)
        self._tally = xids.Tally(ignored_xids)
        self._ended = 0  # processes, when it was last swept
        self._orphans: set[int] = set()
        self._gone: dict[tuple[int, int, int], int] = {}  # looks at which nobody had what they should hold
        self._guesses: dict[tuple[int, int, int], list[int]] = {}  # of processes that are never quiet
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)
        self.truth = Truth()

    def start(self) -> None:
        """Begins; the first look is at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends, unless NVML hangs: then the thread is left behind."""
        self._stopping = True
        self._wake.set()
        self._thread.join(2.0)

    def fileno(self) -> int:
        """Readable when others hold memory than before, or somebody without the shim does, until hush()."""
        return self._bell.fileno()

    def hush(self) -> None:
        """Whoever holds memory by now is known."""
        self._bell.hush()

    def orphaned(self, cgroup: int) -> None:
        """The level has bytes of which only NVML can tell who holds them now."""
        self._orphans.add(cgroup)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.look()
            except Exception as error:  # a thread that ends would stop the truth; the next look may work
                self.truth = replace(self.truth, failure=f"{type(error).__name__}: {error}")
            self._wake.wait(PERIOD_SECONDS)
            self._wake.clear()

    def look(self) -> None:
        """One reconcile: adopt, correct, let go of orphans, sweep, and tell."""
        drift: dict[tuple[int, int], int] = {}
        held: dict[int, Sample] = {}
        orphans, so_far = self._orphans_now(), self._ledger.processes_so_far()
        for device in (d.index for d in self._nvml.devices):
            for _ in range(RETRIES):
                sample, unsettled = self._correct(device, drift)
                if sample is not None:
                    held[device] = sample
                if not unsettled:
                    break
        for cgroup, device, bytes_ in orphans:
            if None not in held.get(device, _NOBODY_SAYS).values():  # who holds them has been charged just now
                self._ledger.disown(cgroup, device, bytes_)
        self._sweep(so_far)
        now, used = time.monotonic(), self._used()
        answered = dict.fromkeys((device for device in held if used[device] is not None), now)
        answered, turns = {**self.truth.answered, **answered}, self._turns(now)
        reported = self._reported()
        before = self.truth
        self.truth = Truth(answered, used, held, drift, turns, processes=self._known, xids=reported)
        if self.truth.pids() != before.pids() or self.truth.strangers():
            self._bell.ring()

    def _reported(self) -> Mapping[int, xids.Reported]:
        came = self._nvml.xids()
        return self._tally.take(self._nvml.watched(), came)

    def _turns(self, now: float) -> Verdict:
        if not self._audit.due(now):
            return self.truth.turns
        return self._audit.look(now, time.time(), self._ledger.times, self._known)

    def _used(self) -> Mapping[int, int | None]:
        now = time.monotonic()
        if now - self._used_at < DEVICE_SECONDS:
            return self.truth.used
        used = {device.index: self._nvml.used_bytes(device.index) for device in self._nvml.devices}
        self._used_at = now
        return used

    def _orphans_now(self) -> list[tuple[int, int, int]]:
        """(level, device, bytes), as they are before NVML is asked."""
        found = []
        for cgroup in list(self._orphans):
            bytes_ = self._ledger.orphaned(cgroup)
            found += [(cgroup, device, n) for device, n in bytes_.items()]
            if not bytes_:
                self._orphans.discard(cgroup)
        return found

    def _correct(self, device: int, drift: dict[tuple[int, int], int]) -> tuple[Sample | None, bool]:
        """Sets every quiet process's overhead to what NVML shows beyond what was witnessed.

        Between the read of a process and its correction nothing may be charged, released, admitted or in a call: the
        kernel refuses the correction where another change has begun. None: NVML does not say. Where it says of one
        process that nobody knows, that one stays as it was witnessed; so does one that has a context and is not named,
        unless its memory is nowhere on the device: that was lost or reset under it.
        """
        before = self._known = self._ledger.processes()
        sample = self._nvml.process_bytes(device)
        if sample is None:
            return None, False
        unquiet: dict[int, tuple[Process, int]] = {}
        self._look_for_the_unnamed(device, sample, before)
        for tgid, process in before.items():
            is_there = process.contexts[device] and self._gone.get((tgid, process.generation, device), 0) < GONE
            held = sample.get(tgid, None if is_there else 0)
            if held is None or (tgid not in sample and process.bytes[device] and not _alive(tgid)):
                continue
            if tgid not in sample and not process.bytes[device]:
                drift[tgid, device] = 0
                continue
            if not process.quiet or not self._correct_process(tgid, process, device, held, drift):
                unquiet[tgid] = (process, held)
        self._adopt(sample, before)
        chronic = {key for key, kept in self._guesses.items() if len(kept) >= NEVER_QUIET}  # another look is no use
        self._raise_the_unquiet(device, unquiet)
        return sample, any((tgid, before[tgid].generation, device) not in chronic for tgid in unquiet)

    def _look_for_the_unnamed(self, device: int, sample: Sample, known: Mapping[int, Process]) -> None:
        """Counts the looks at which less is in use on the device than a process holds that should be named."""
        unnamed = {tgid: p for tgid, p in known.items() if p.contexts[device] and tgid not in sample}
        left = self._nvml.unnamed_bytes(device, sample) if unnamed else None
        counts = {key: n for key, n in self._gone.items() if key[2] != device}
        for tgid, process in unnamed.items():
            key = (tgid, process.generation, device)
            if left is not None and left < process.witnessed(device):
                counts[key] = self._gone.get(key, 0) + 1
        self._gone = counts

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

    def _raise_the_unquiet(self, device: int, unquiet: Mapping[int, tuple[Process, int]]) -> None:
        """A process that is never quiet hides nothing for long: the least that many looks agree on is charged.

        What was witnessed is at any moment at least what the driver gave, so a guess is too high only where the
        process took memory between our look and NVML's; of many in a row the least is not.
        """
        guesses = {}
        after = self._ledger.processes() if unquiet else {}
        for tgid, (process, held) in unquiet.items():
            now = after.get(tgid)
            if now is None or now.generation != process.generation:
                continue
            key = (tgid, process.generation, device)
            guess = held - max(process.witnessed(device), now.witnessed(device))
            guesses[key] = [*self._guesses.get(key, []), guess][-NEVER_QUIET:]
            more = min(guesses[key]) - now.overhead[device]
            if len(guesses[key]) == NEVER_QUIET and more > 0:
                self._ledger.raise_overhead(tgid, process.generation, device, more)
        self._guesses = {key: kept for key, kept in self._guesses.items() if key[2] != device} | guesses

    def _adopt(self, sample: Sample, known: Mapping[int, Process]) -> None:
        """Enters processes of managed cgroups that hold memory and that the kernel never saw.

        Not those that have ended: the driver takes a tenth of a second to free what they held, and nobody bypasses.
        """
        for pid, held in sample.items():
            if pid in known or held is None:
                continue
            path = procfs.cgroup_path(pid)
            levels = self._levels(path) if path else ()
            if levels and not procfs.ended(pid):
                self._ledger.move(pid, 0, levels)

    def _sweep(self, so_far: int) -> None:
        """Reaps processes whose end nobody told, and deletes what ended ones left: those too that came and went between
        two looks. `so_far`: entries that there were before these were read; so an end that is missed shows later.
        """
        now = {(tgid, p.generation) for tgid, p in self._known.items()}
        for tgid, process in self._known.items():
            if process.late:
                self._ledger.move(tgid, process.generation, process.levels)
        for tgid, generation in now:
            if not _alive(tgid) or (not self._known[tgid].flags and procfs.ended(tgid)):  # adopted on its way out
                self._ledger.reap(tgid, generation)
        ended = so_far - len(now)
        if ended != self._ended:
            self._ended = ended
            self._ledger.sweep()


def overhead_for(exact: int, pool: int) -> int:
    """The overhead that makes the ledger what NVML shows, but for pool bytes that the driver has given back meanwhile:

    the shim spends those again without asking, so they stay charged until it gives them back itself.
    """
    return max(exact, min(0, exact + pool))


def _alive(tgid: int) -> bool:
    return os.path.exists(f"/proc/{tgid}")
