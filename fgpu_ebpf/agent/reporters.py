"""The reporters. A reporter adds events of one kind to the event log, and keeps a record to report nothing twice.

All reporters run in the agent's main loop. StaleMountReports runs in every scan of all cgroups. The other reporters run
once a round, and AdoptionReports also runs after a reconcile pass that wakes the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping

from fgpu_ebpf import abi
from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver import xids
from fgpu_ebpf.driver.descriptor_holders import AGE_NS, Held, Keepers
from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.process_entry import Process, levels_of
from fgpu_ebpf.ledger.unwitnessed_memory import Unwitnessed
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.policy.units import memory_text
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.tenant import Tenant
from fgpu_ebpf.workloads.shim_mounts import BESIDE, FOLDER, Mount, mount_of, one_of_each_namespace

TOLD_AGE_NS = 5_000_000_000  # age at which an orphan is reported
LOOK_SECONDS = 1.0  # between two checks for overruns
AGAIN_SECONDS = 10.0  # between two reports of overruns of one tenant on one device
_MOUNTS = "mounts"
_MOUNT_WORDS = {
    Mount.REMOVED: f"{FOLDER} was removed while {{}} ran",
    Mount.HIDDEN: f"a mount hides {FOLDER} in {{}}",
}
_MOUNT_FIX = (
    "restart the container: its mount shows the removed folder as long as the container runs; where a mount hides the "
    f"folder, create the container again, so that the container has the folder at {BESIDE} too"
)
_MOST_LOOKED_AT = 64
_MOST_NAMED = 5
_Process = tuple[int, int]  # pid, generation
_Life = tuple[int, int, int]  # pid, generation, device
_Turns = Mapping[tuple[int, int], TurnCounts]


class AdoptionReports:
    """The reporter of adopted processes. `truth` returns the last result of NVML."""

    def __init__(
        self,
        truth: Callable[[], Truth],
        ledger: Ledger,
        enforcer: Enforcer,
        history: EventLog,
        unwitnessed: Unwitnessed,
    ) -> None:
        self._truth = truth
        self._ledger = ledger
        self._enforcer = enforcer
        self._history = history
        self._unwitnessed = unwitnessed
        self._last: Truth | None = None
        self._reported: set[_Process] = set()
        self._held: set[_Process] = set()  # at the last check

    def look(self) -> None:
        """Report adopted processes, once for each new result of NVML.

        The method first updates the cgroups that `onBypass: kill` exempts, and commits the limits of charged levels.
        Preexisting processes are reported immediately. Other processes are reported when a second result contains them,
        because after an exec the driver takes a moment to free the memory of the earlier program.
        """
        truth = self._truth()
        if truth is self._last:
            return
        self._last = truth
        self._enforcer.update_spared()
        self._enforcer.use_charged(levels_of(truth.processes))
        beyond = self._unwitnessed.find(truth.processes, truth.orphans)
        strangers = truth.strangers() | {pid for pid, _ in beyond}
        known = {pid: p for pid in strangers if (p := self._ledger.process(pid)) and p.levels}
        self._reported &= {(pid, p.generation) for pid, p in known.items()}
        before, self._held = self._held, {(pid, p.generation) for pid, p in known.items() if any(p.bytes)}
        for life in self._held - self._reported:
            if life in before or life[0] in self._enforcer.preexisting:
                self._reported.add(life)
                self._report(life[0], known[life[0]], any(pid == life[0] for pid, _ in beyond))

    def _report(self, pid: int, process: Process, is_beyond: bool) -> None:
        tenant = self._enforcer.get(process.levels[0])
        is_preexisting = pid in self._enforcer.preexisting
        if tenant is None or procfs.ended(pid):
            return
        if process.flags & (abi.Seen.SHIM | abi.Seen.CALL) and not is_preexisting and not is_beyond:
            return
        for device, bytes_ in enumerate(process.bytes):
            if bytes_:
                self._history.add(
                    "adopted", tenant=tenant.name, pid=pid, gpu=device, bytes=bytes_,
                        reason="older than fgpu" if is_preexisting else "unwitnessed",
                    text=self._beyond(tenant.cgroup, device),
                )  # fmt: skip

    def _beyond(self, cgroup: int, device: int) -> str:
        """Return a text about a tenant that exceeds its limit, or an empty text if the limit is not exceeded."""
        (usage,) = self._ledger.usage(cgroup, (device,)) or (None,)
        if usage is None or usage.limit == abi.NO_LIMIT or usage.used <= usage.limit:
            return ""
        return f"the tenant has {memory_text(usage.used)} of {memory_text(usage.limit)}: nothing more is admitted"


class OrphanReports:
    """The reporter of orphans and of the processes that keep their memory. `truth` returns the last result of NVML."""

    def __init__(self, truth: Callable[[], Truth], manager: Manager, keepers: Keepers, history: EventLog) -> None:
        self._truth = truth
        self._manager = manager
        self._keepers = keepers
        self._history = history
        self._reported: set[_Life] = set()

    def look(self) -> None:
        """Search for the processes that keep the memory of orphans, and report each orphan once, after TOLD_AGE_NS."""
        now = time.monotonic_ns()
        orphans = self._truth().orphans
        old = [orphan for orphan in orphans if now - orphan.since_ns > AGE_NS]
        tenants = {tenant.cgroup: tenant for tenant in (*self._manager.enforcer, *self._manager.gone)}
        self._keepers.look([_held(orphan, tenants) for orphan in old])
        self._reported &= {_life(orphan) for orphan in orphans}
        for orphan in old:
            if now - orphan.since_ns > TOLD_AGE_NS and _life(orphan) not in self._reported:
                self._reported.add(_life(orphan))
                self._report(orphan, tenants)

    def _report(self, orphan: Orphan, tenants: dict[int, Tenant]) -> None:
        tenant = next((tenants[level] for level in orphan.levels if level in tenants), None)
        keepers = ", ".join(map(str, self._keepers.of(orphan.tgid)))
        self._history.add(
            "orphaned", tenant=tenant.name if tenant else "", pid=orphan.tgid, gpu=orphan.device, bytes=orphan.bytes,
            reason="ended" if orphan.ended_ns else "exported",
            text=f"kept by pid {keepers}" if keepers else "no process that keeps the memory was found",
        )  # fmt: skip


def _life(orphan: Orphan) -> _Life:
    return orphan.tgid, orphan.generation, orphan.device


def _held(orphan: Orphan, tenants: dict[int, Tenant]) -> Held:
    paths = [tenants[level].path for level in orphan.levels if level in tenants]
    return Held(orphan.tgid, (*filter(None, paths), "/"))


class OverrunReports:
    """The reporter of turns that ended with work in flight.

    `turns` returns the counts by level and device; `name_of` returns the tenant of a level.
    """

    def __init__(self, turns: Callable[[], _Turns], name_of: Callable[[int], str], history: EventLog) -> None:
        self._turns = turns
        self._name_of = name_of
        self._history = history
        self._reported = {key: counts.overruns for key, counts in turns().items()}
        self._reported_at: dict[tuple[int, int], float] = {}
        self._looked_at = -LOOK_SECONDS

    def look(self) -> None:
        """Report new overruns. Check once a second, and report a tenant on a device at most every AGAIN_SECONDS."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        turns = self._turns()
        self._reported = {key: reported for key, reported in self._reported.items() if key in turns}
        self._reported_at = {key: at for key, at in self._reported_at.items() if now - at < AGAIN_SECONDS}
        for key, counts in turns.items():
            reported = self._reported.setdefault(key, 0)
            if counts.overruns < reported:  # a new gatekeeper or share counts from 0
                reported = 0
            if counts.overruns > reported and key not in self._reported_at:
                self._report(key, counts.overruns - reported)
                self._reported[key], self._reported_at[key] = counts.overruns, now

    def _report(self, key: tuple[int, int], number: int) -> None:
        level, device = key
        turns = "a turn" if number == 1 else f"{number} turns"
        text = f"{turns} ended with work in flight"
        self._history.add("overrun", tenant=self._name_of(level), gpu=device, text=text)


class StaleMountReports:
    """The reporter of containers in which the shim cannot find the gatekeeper's folder, which was removed or is hidden.

    `pids` returns the processes of a cgroup; `failed_checks` are the agent's failed checks.
    """

    def __init__(
        self, pids: Callable[[str], list[int]], history: EventLog, failed_checks: MutableMapping[str, Check]
    ) -> None:
        self._pids, self._history, self._failed_checks = pids, history, failed_checks
        self._reported: set[tuple[str, str]] = set()

    def look(self, tenants: Iterable[Tenant]) -> Iterator[None]:
        """Check one process of each mount namespace of each tenant, and report tenants with a stale mount.

        At most _MOST_LOOKED_AT processes of a tenant are considered. The iterator yields after each tenant.
        """
        found = set[tuple[str, str]]()
        for tenant in tenants:
            for pid in one_of_each_namespace(self._pids(tenant.path)[:_MOST_LOOKED_AT]):
                if words := _MOUNT_WORDS.get(mount_of(pid)):
                    found.add((words, tenant.name))
            yield
        for words, name in sorted(found - self._reported):
            self._history.add("stale mount", tenant=name, text=words.format("the container"))
        self._reported = found
        self._failed_checks.pop(_MOUNTS, None)
        if found:
            named = [
                words.format(", ".join(sorted(name for said, name in found if said == words)[:_MOST_NAMED]))
                for words in dict.fromkeys(said for said, _ in sorted(found))
            ]
            text = f"{'; '.join(named)}: programs that start in such a container get no memory"
            self._failed_checks[_MOUNTS] = Check("mounts", False, text, _MOUNT_FIX)


class XidReports:
    """The reporter of XIDs and of their effect on shares. `truth` returns the last result of NVML."""

    def __init__(self, truth: Callable[[], Truth], history: EventLog) -> None:
        self._truth = truth
        self._history = history
        self._reported: dict[tuple[int, int], int] = {}

    def look(self) -> None:
        """Report the XIDs that are new."""
        for device, reported in self._truth().xids.items():
            for xid, count in reported.counts.items():
                more = count - self._reported.get((device, xid), 0)
                if more:
                    self._reported[device, xid] = count
                    self._report(device, xid, more, reported)

    def _report(self, device: int, xid: int, more: int, reported: xids.Reported) -> None:
        times = "" if more == 1 else f", {more} times"
        meaning = ": no share of the device is offered" if reported.fatal == xid else ""
        self._history.add("xid", gpu=device, text=f"{xid}{times}{meaning}")
