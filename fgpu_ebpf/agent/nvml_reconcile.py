"""The reconcile thread, which compares the ledger with NVML and corrects the ledger.

The thread runs beside the agent's main loop, because NVML may hang. While NVML hangs, probes still update the ledger,
and a metric shows the age of the last answer. Corrections are in `ledger_corrections`, releases of orphans in
`orphan_release`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from fgpu_ebpf import abi
from fgpu_ebpf.agent import driver_limits
from fgpu_ebpf.agent.carried_charges import Carried
from fgpu_ebpf.agent.ledger_corrections import Corrections, Drift
from fgpu_ebpf.agent.orphan_release import OrphanRelease
from fgpu_ebpf.agent.turn_audit import LOOK_SECONDS, Audit, Percent, Verdict
from fgpu_ebpf.check import Check, has_host_pids
from fgpu_ebpf.driver import device_sample, xids
from fgpu_ebpf.driver.device_sample import Rows, Sample
from fgpu_ebpf.driver.nvml import Nvml
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.wakeup import Wakeup

PERIOD_SECONDS = 0.5
LEVELS_AT_A_TIME = 64
RETRIES = 3
DEVICE_SECONDS = 1.0  # between two readings of a device's memory in use, while no orphaned bytes depend on the reading
STALE_SECONDS = 5.0  # ten full passes
# The periods of passes while a device may hold orphaned bytes, as (age, period) in seconds. A period applies up to this
# age of the youngest orphan.
ORPHAN_PERIODS = ((5.0, 0.02), (60.0, 0.1), (float("inf"), 0.25))
# The first of these periods applies, whatever the age, for this long after the start (bytes of a ledger of another
# layout are orphans without an entry) and after each event of orphaned bytes (an old entry may grow).
HURRY_SECONDS = 5.0
NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Truth:
    """The last result of NVML, and the state of the ledger just before that result.

    `answered`: the time of NVML's last answer by device, on the monotonic clock. `used`: bytes in use by device.
    `held`: bytes by device and host pid (None: NVML reports "N/A"). `drift`: ledger minus NVML in bytes, for each
    process that was compared, by pid and device. `turns`: the result of the audit of turns. `failure`: the error of the
    last pass; empty if the pass succeeded. `processes`: the processes of the ledger. `xids`: the XIDs of devices, if
    NVML reports XIDs. `orphans`: the orphans of the ledger. `ended`: bytes by device and pid that NVML shows for ended
    processes. `unexplained`: bytes in use by device that no process, orphan or known rest explains. `percent`: the
    percentage of a device's time in the last second, by device and pid (None: not reported by NVML). `sampled`: the
    time of these percentages, on the monotonic clock. `mig`: the devices in MIG mode.
    """

    answered: Mapping[int, float] = field(default_factory=dict)
    used: Mapping[int, int | None] = field(default_factory=dict)
    held: Mapping[int, Rows] = field(default_factory=dict)
    drift: Mapping[tuple[int, int], int] = field(default_factory=dict)
    turns: Verdict = field(default_factory=Verdict)
    failure: str = ""
    processes: Mapping[int, Process] = field(default_factory=dict)
    xids: Mapping[int, xids.Reported] = field(default_factory=dict)
    orphans: Sequence[Orphan] = ()
    ended: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    unexplained: Mapping[int, int] = field(default_factory=dict)
    percent: Mapping[int, Percent | None] = field(default_factory=dict)
    sampled: float = 0.0
    mig: frozenset[int] = frozenset()

    def pids(self) -> set[int]:
        """Return the pids that NVML lists, except pids of ended processes."""
        return {
            pid
            for device, held in self.held.items()
            for pid, bytes_ in held.items()
            if bytes_ is None or bytes_ > self.ended.get(device, {}).get(pid, 0)
        }

    def strangers(self) -> set[int]:
        """Return the pids that NVML lists and whose processes have no shim according to the ledger."""
        seen = (pid for pid, process in self.processes.items() if process.flags & abi.Seen.SHIM)
        return self.pids().difference(seen)


def check(ages: Mapping[int, float | None], failure: str) -> Check:
    """Check that NVML answers.

    `ages`: the seconds since NVML's last answer by device, or None before the first answer.
    """
    stale = {index: age for index, age in ages.items() if age is None or age > STALE_SECONDS}
    said = ", ".join(f"gpu {i} {'never' if age is None else f'{age:.1f} s ago'}" for i, age in sorted(stale.items()))
    if stale or failure:
        found = [f"last answer of NVML: {said}"] if stale else []
        found += [f"the last comparison with NVML failed: {failure}"] if failure else []
        return Check("reconcile", False, "; ".join(found), "nvidia-smi shows whether the driver responds")
    return Check("reconcile", True, f"NVML answered {max(filter(None, ages.values()), default=0.0):.1f} s ago")


class Reconciler:
    """The reconcile thread, from start() to stop()."""

    def __init__(
        self,
        nvml: Nvml,
        ledger: Ledger,
        levels: Callable[[str], tuple[int, ...]],
        tally: xids.Tally | None = None,
        ran: Iterable[int] = (),
        run_dir: Path | None = None,
        root: Path = Path("/"),
    ) -> None:
        """Make the thread.

        Args:
            nvml: the devices.
            ledger: the ledger.
            levels: returns the levels of a cgroup's path.
            tally: counts XIDs.
            ran: pids of programs that ran before this start, if this start has changed the layout.
            run_dir: the folder for the record of the driver's own limits; None: these limits are not set.
            root: the root of the driver's libraries.
        """
        self._nvml = nvml
        self._ledger = ledger
        self._wake = threading.Event()
        self._wakeup = Wakeup()
        self._stopping = False
        self._lets_go = self.has_let_go = False  # whether a release of the devices was requested, and is done
        self._known: Mapping[int, Process] = {}
        self._audit = Audit()
        self._tally = tally or xids.Tally()
        self.driver_limits = driver_limits.DriverLimits(nvml, run_dir / driver_limits.FILE, root) if run_dir else None
        self._repaired: deque[int] = deque()  # devices that `fgpu device clear` has named
        self._ended = 0  # the number of ended processes at the last sweep
        self._devices_at = 0.0  # the time of the next reading of the devices' memory in use
        self._levels: set[int] = set()  # levels that have, or may have, orphaned bytes without an entry
        self._hurry_until = 0.0
        self._level = 0  # index in the ledger's list of levels of the next level to be checked
        self._corrections = Corrections(nvml, ledger, levels)
        self._carried = Carried(ledger, ran)
        self._releases = {d.index: OrphanRelease(ledger, d.index) for d in nvml.devices}
        self._has_looked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)
        self.truth = Truth()

    def start(self, seconds: float = 0.0) -> None:
        """Start the thread, whose first pass begins immediately.

        `seconds`: how long to wait for the end of the first pass.
        """
        self._hurry_until = time.monotonic() + HURRY_SECONDS
        self._thread.start()
        self._has_looked.wait(seconds)

    def stop(self) -> None:
        """End the thread. If NVML hangs, leave the thread running after 2 s."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(2.0)

    def fileno(self) -> int:
        """Return a descriptor that is readable after a change of the processes that hold memory.

        The descriptor is also readable after a full pass in which a process without the shim holds memory.
        """
        return self._wakeup.fileno()

    def clear(self) -> None:
        """Make the descriptor unreadable until one of the two cases of fileno() occurs again."""
        self._wakeup.clear()

    def add_device(self, index: int) -> None:
        """Include a device in all later passes. `index`: the index of the device in the ledger."""
        self._releases = {**self._releases, index: OrphanRelease(self._ledger, index)}

    def let_go(self, devices: bool) -> None:
        """Start a pass that releases the devices, or opens the devices again if `devices` is False."""
        self._lets_go = devices
        self._wake.set()

    def repaired(self, index: int) -> None:
        """Record that a device was repaired. XIDs that the device has reported so far are no longer fatal."""
        self._repaired.append(index)

    def orphaned(self, cgroup: int) -> None:
        """Record that a level has orphaned bytes, and start a pass. `cgroup`: the level's cgroup id."""
        self._levels.add(cgroup)
        self._hurry_until = time.monotonic() + HURRY_SECONDS
        self._wake.set()

    def _run(self) -> None:
        full_at = 0.0
        while not self._stopping:
            self._wake.clear()
            is_full = time.monotonic() >= full_at
            if is_full:
                full_at = time.monotonic() + PERIOD_SECONDS
            try:
                self.look(is_full)
            except Exception as error:  # the thread must not end, because the next pass may succeed
                self.truth = replace(self.truth, failure=f"{type(error).__name__}: {error}")
            self._has_looked.set()
            self._wait(full_at)

    def _wait(self, full_at: float) -> None:
        """Wait until the next pass is due. New orphans and requests end the wait after a short pause."""
        looked, period = time.monotonic(), _period(self.truth.orphans)
        if self._levels and looked < self._hurry_until:
            period = ORPHAN_PERIODS[0][1]
        if self._wake.wait(max(0.0, min(full_at - looked, period))):
            time.sleep(max(0.0, looked + ORPHAN_PERIODS[0][1] - time.monotonic()))

    def look(self, is_full: bool = True) -> None:
        """Do one pass: correct charges, adopt processes, and release orphans.

        A full pass also removes exited processes from the ledger, and reads the values that change slowly.
        """
        if (lets_go := self._lets_go) != self.has_let_go:
            (self._nvml.release if lets_go else self._nvml.take_up)()
            self.has_let_go = lets_go
        is_due = is_full and time.monotonic() >= self._devices_at
        drift: Drift = {}
        held: dict[int, Rows] = {}
        ended: dict[int, Mapping[int, int]] = {}
        unexplained: dict[int, int] = {}
        orphans, so_far = self._ledger.orphans.entries(), self._ledger.processes_so_far()
        for device, release in self._releases.items():
            own = [orphan for orphan in orphans if orphan.device == device]
            rows = self._look_at(device, release, own, drift, ended, RETRIES if is_full else 1, is_due)
            if rows is not None:
                held[device], unexplained[device] = rows, release.balance.unexplained
        if not held:  # no sample of this pass has the processes
            self._known = self._ledger.processes()
        self._carried.look()
        before = self.truth
        now = replace(before, held=held, drift=drift, orphans=orphans, ended=ended, unexplained=unexplained)
        self.truth = self._full(now, so_far, is_due) if is_full else replace(now, processes=self._known, failure="")
        pids = self.truth.pids()
        if pids != before.pids() or (is_full and pids):
            self._wakeup.wake()

    def _look_at(
        self,
        device: int,
        release: OrphanRelease,
        orphans: Sequence[Orphan],
        drift: Drift,
        ended: dict[int, Mapping[int, int]],
        tries: int,
        is_due: bool,
    ) -> Rows | None:
        """Compare one device with the ledger, and return NVML's rows, or None if NVML does not answer.

        Overheads are corrected before orphans are released, so that memory in the row of an importing process is
        charged to the importing process before the release.

        Args:
            tries: the maximum number of comparisons. After one comparison, further comparisons follow only while
                processes are not idle.
            is_due: read the memory in use even if no orphans depend on the reading.
        """
        samples = device_sample.SAMPLES if orphans or self._levels else 0
        sample = self._sample(device, samples)
        for n in range(tries):
            if sample is None:
                release.balance.forget()
                return None
            self._known = sample.processes
            ended[device] = release.ended_rows(sample, orphans)
            is_unquiet = self._corrections.look(device, sample, ended[device], drift)
            if not is_unquiet or n == tries - 1:
                break
            sample = self._sample(device, samples)
        assert sample
        if is_due and not sample.taken:
            sample = self._sample(device, 1) or sample
        room = release.look(sample, orphans, ended[device])
        if room is not None and self._levels:
            release.look_without_entries(list(self._levels), room)
        if room is not None:
            release.note_kept(sample, list(self._levels))
        return sample.rows

    def _sample(self, device: int, samples: int) -> Sample | None:
        """Reset the peaks of processes, and take a sample.

        Bytes of a row are charged already, up to the peak of the process since the reset. If a process may have hidden
        memory, all samples are taken, because hidden memory must be estimated before there are orphans.
        """
        processes = self._ledger.processes()
        if any(device_sample.is_hidden(process, device) for process in processes.values()):
            samples = device_sample.SAMPLES
        self._corrections.mark(device, processes)
        return device_sample.take(self._nvml, self._ledger, device, processes, samples)

    def _full(self, now: Truth, so_far: int, is_due: bool) -> Truth:
        """Do the additional work of a full pass, and return the result with the additional values."""
        self._sweep(so_far)
        at, used, mig = time.monotonic(), now.used, now.mig
        if is_due:
            self._choose_levels()
            if self.driver_limits:
                self.driver_limits.look()
            self._nvml.look_for_missing()
            used = {device.index: self._nvml.used_bytes(device.index) for device in self._nvml.devices}
            mig = frozenset(device.index for device in self._nvml.devices if self._nvml.in_mig_mode(device.index))
            self._devices_at = at + DEVICE_SECONDS
        answered = dict.fromkeys((device for device in now.held if used.get(device) is not None), at)
        if self._audit.due(at):
            now = self._with_turns(now, at)
        return replace(
            now, answered={**now.answered, **answered}, used=used, processes=self._known, xids=self._reported(),
            failure="", mig=mig,
        )  # fmt: skip

    def _choose_levels(self) -> None:
        """Choose the levels that the next passes check for orphaned bytes without an entry.

        Each call adds the next LEVELS_AT_A_TIME levels, because an event of orphaned bytes may have been lost. A call
        drops the levels that have no orphaned bytes.
        """
        pages = self._ledger.tenants()
        self._levels.update(islice(pages, self._level, self._level + LEVELS_AT_A_TIME))
        self._level = self._level + LEVELS_AT_A_TIME if self._level < len(pages) else 0
        levels = list(self._levels)
        self._levels.difference_update({*levels} - {*self._ledger.orphans.levels_with_bytes(levels, pages)})

    def _reported(self) -> Mapping[int, xids.Reported]:
        repaired = [(self._repaired.popleft(), None) for _ in range(len(self._repaired))]  # before this pass's XIDs
        came = self._nvml.xids()  # the first call registers the devices that watched() returns
        return self._tally.take(self._nvml.watched(), [*repaired, *came])

    def _with_turns(self, now: Truth, at: float) -> Truth:
        """Add the running times of processes in the last second, and the audit of turns.

        Unused devices are not measured.
        """
        since = time.time() - LOOK_SECONDS
        percent = {
            device: self._nvml.process_percent(device, since) if rows else {} for device, rows in now.held.items()
        }
        turns = self._audit.look(at, percent, self._ledger.times, self._known)
        return replace(now, percent=percent, sampled=at, turns=turns)

    def _sweep(self, so_far: int) -> None:
        """Remove exited processes without a reported exit, and delete the allocations of exited processes.

        The sweep also moves late charges (`Process.late`) to the levels to which their process was moved, and deletes
        the entries of processes that have left all levels. The main thread may have moved a process again since the
        entries were read, so the levels in the entries are not used.

        Args:
            so_far: the number of entries of processes that were ever created, read before the processes. The number
                shows whether processes have started and exited between two passes. A later pass finds an exit that this
                pass misses.
        """
        now = {(tgid, p.generation) for tgid, p in self._known.items()}
        self._corrections.forget_ended(self._known)
        for tgid, process in self._known.items():
            if process.late or not process.levels:
                self._ledger.finish_move(tgid, process.generation)
        for tgid, generation in now if has_host_pids() else ():  # another pid namespace has none of these pids
            if not _alive(tgid) or (not self._known[tgid].flags and procfs.ended(tgid)):  # adopted while it exited
                self._ledger.reap(tgid, generation)
        self._ledger.orphans.forget_empty(now)
        ended = so_far - len(now)
        if ended != self._ended:
            self._ended = ended
            self._ledger.sweep()


def _period(orphans: Sequence[Orphan]) -> float:
    """Return the seconds between two passes, which depend on the age of the youngest orphan."""
    if not orphans:
        return PERIOD_SECONDS
    age = (time.monotonic_ns() - max(orphan.since_ns for orphan in orphans)) / NS
    return next(period for until, period in ORPHAN_PERIODS if age < until)


def _alive(tgid: int) -> bool:
    """Return whether a process exists, also if the host has no memory for the answer."""
    try:
        os.stat(f"/proc/{tgid}")
    except OSError as error:
        return error.errno in procfs.SHORTAGES
    return True
