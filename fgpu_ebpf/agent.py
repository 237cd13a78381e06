"""The agent: puts limits in force, keeps probes and truth up to date, takes a Snapshot when somebody asks.

Owns: the order of things at start, and the loop. Never: sits in the path of an allocation. When it ends, limits stay
in force in the kernel; the next agent takes up what is pinned.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fgpu_ebpf import (
    cdi,
    devices,
    heap,
    inject,
    launch,
    notify,
    probes,
    procfs,
    profiles,
    programs,
    published,
    xid_record,
)
from fgpu_ebpf.adoption import Adoption
from fgpu_ebpf.bypass_killer import BypassKiller
from fgpu_ebpf.checks import Check
from fgpu_ebpf.context_sizes import context_bytes
from fgpu_ebpf.detach import NAMES, TENANT_NAMES, take_away
from fgpu_ebpf.device_indexes import pinned
from fgpu_ebpf.discovery import Discovery
from fgpu_ebpf.elders import Elders
from fgpu_ebpf.enforcer import Enforcer
from fgpu_ebpf.engines import Engines, api_of
from fgpu_ebpf.gone_tenants import GoneTenants
from fgpu_ebpf.history import History
from fgpu_ebpf.keeper import Keeper
from fgpu_ebpf.keepers import Keepers
from fgpu_ebpf.late_devices import LateDevices
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.level_places import LevelPlaces
from fgpu_ebpf.library_files import driver_libraries
from fgpu_ebpf.locks import AGENT as LOCK
from fgpu_ebpf.locks import FileLock
from fgpu_ebpf.manager import Manager
from fgpu_ebpf.news import Newsreader
from fgpu_ebpf.orphan_reports import OrphanReports
from fgpu_ebpf.overrides import Overrides
from fgpu_ebpf.overruns import Overruns
from fgpu_ebpf.pinned_levels import doubts, take_up
from fgpu_ebpf.policies import Policies, Start, at_start
from fgpu_ebpf.privileges import AGENT, keep_only
from fgpu_ebpf.probe_plan import ProbeError, look_up
from fgpu_ebpf.reconcile import Reconciler, Truth
from fgpu_ebpf.settings import Settings
from fgpu_ebpf.shimless import Reasons
from fgpu_ebpf.snapshot import Snapshot
from fgpu_ebpf.stale_mounts import StaleMounts
from fgpu_ebpf.start_checks import AgentError, check_kernel
from fgpu_ebpf.unwitnessed import Unwitnessed
from fgpu_ebpf.urgency import come_first
from fgpu_ebpf.view import take_snapshot
from fgpu_ebpf.workloads import Workloads
from fgpu_ebpf.xid_record import XidRecord
from fgpu_ebpf.xidnews import XidNews
from fgpu_ebpf.yamlfile import Fault

log = logging.getLogger("fgpu.agent")
ROUND_SECONDS = 1.0
HURRY_SECONDS = 0.1  # while there is no gatekeeper
SNAPSHOT_SECONDS = 1.0  # no older than this is a Snapshot that is shown
RESCAN_SECONDS = 30.0  # for what no event tells: attributes of a cgroup that change later
AHEAD_BYTES = 1 << 20  # of small objects: what requests, scrapes and rescans of one moment take
STATE = Path("/var/lib/fgpu/contexts.json")


@dataclass(frozen=True, slots=True)
class _Found:
    """What a start has before it attaches anything; `shim` is this version's file, perhaps not published yet."""

    digest: str
    libraries: list[Path]
    shim: Path
    contexts: dict[int, int]
    policies: Start
    older: Elders


class Agent:
    """One a host, by flock."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.snapshot = Snapshot(time.time())
        self._taken, self._next_round = -SNAPSHOT_SECONDS, 0.0
        self.selector = selectors.DefaultSelector()
        self.history, self.lacks = History(), dict[str, Check]()  # what is missing beside enforcement
        self.keeper = Keeper(settings.run_dir, settings.pins)
        self.engines = Engines(map(api_of, settings.engines), settings.run_dir / NAMES)
        self.reconciler: Reconciler | None = None
        self._reasons = Reasons(lambda dev, ino: self.discovery.is_shim(dev, ino), lambda: self.discovery.hidden())
        self._unwitnessed, self.keepers = Unwitnessed({}), Keepers()
        self._policies: Policies | None = None
        self.marks: dict[str, float] = {}  # when each part of the start was done
        self._ended = self._reload_wanted = False
        self.failures = self.writes_refused = 0
        self._lists = inject.Lists(settings.run_dir)
        self.chores: list[Callable[[], object]] = []  # of every round
        self.parts: cdi.Parts | None = None  # what containers are given; None: nothing

    # -- start

    def start(self) -> None:
        """Takes the lock, loads, probes, puts known limits in force. AgentError: what is missing, and the mend."""
        self.settings.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._lock()
        procfs.raise_descriptor_limit()
        try:
            found = self._load()
            self.mark("loaded")
            keep_only(AGENT)  # before there is a second thread
            self.ledger = Ledger(self.settings.pins)
            self._attach(found)
            self.mark("attached")
        except (devices.DriverError, ProbeError, programs.ProgramError) as error:
            raise AgentError(str(error)) from error
        self.keeper.start()
        self._take_up(found)
        launch.write_preload(self.settings.run_dir, self.shim)
        self._follow()
        self._inject()
        self.mark("in force")

    def mark(self, part: str) -> None:
        """That part of the start is done."""
        self.marks[part] = time.monotonic()

    def _lock(self) -> None:
        self._lock_file = FileLock(self.settings.run_dir / LOCK)
        if not self._lock_file.take():
            raise AgentError("an agent is running on this host already")

    def _load(self) -> _Found:
        """What needs no programs is done while they are compiled. Raises what the parts raise."""
        root, shim = self.settings.driver_root, self.settings.shim
        libraries = driver_libraries(root, "libcuda.so.1")
        if not libraries:
            devices.Nvml(root)  # says it better where there is no driver at all
            raise AgentError(f"no libcuda.so.1 under {root}: install the driver's CUDA library")
        loading = programs.Loading(self.settings.sources, self.settings.pins, self.settings.loader)
        try:
            self.nvml = devices.Nvml(root, pinned(self.settings.pins))
            self.mark("devices")
            contexts = context_bytes(self.nvml, libraries[0], STATE)
            check_kernel(loading, shim)
            self._release = published.Release(shim, self.settings.store)
            look_up([self._release.file, *libraries])
            policies, older = at_start(self.settings.policy_folder), Elders.found(self.settings.run_dir)
            self.mark("prepared")
            return _Found(loading.wait(), libraries, self._release.file, contexts, policies, older)
        finally:
            loading.end()

    def _attach(self, found: _Found) -> None:
        """Names the devices, and probes every file in use. Raises what the parts raise."""
        for device in self.nvml.devices:
            self.ledger.set_device(device.index, device.uuid)
            self.ledger.set_context_bytes(device.index, found.contexts[device.index])
        self._unwitnessed = Unwitnessed(found.contexts)
        attached = probes.Probes(self.settings.pins, found.digest, self.ledger)
        attached.attach_process_ends()
        self._publish(attached, found)
        for folder in probes.folders_of_other_layouts(self.settings.pins):
            probes.detach(folder)

    def _publish(self, attached: probes.Probes, found: _Found) -> None:
        """Programs that start get the new shim from when it is probed on, and until then the one before."""
        store, listed = self.settings.store, self.settings.trusted_drivers
        shims, most = self._release.files(), self.settings.bounds.files
        self.discovery = Discovery.of_host(attached, found.libraries, shims, store, listed, most)
        used = self.discovery.start()
        self.shim = self._release.publish()
        self.lacks |= self._release.lacks()
        if store and used is not None:
            with contextlib.suppress(OSError):  # they only take room
                published.retire(store, used)

    def _take_up(self, found: _Found) -> None:
        """Brings kernel, policies and what was set by hand together: the files say, the kernel follows."""
        s, root = self.settings, procfs.cgroup2_root()
        assert root  # a host check
        workloads = Workloads(root, self.engines)
        overrides = Overrides(self.settings.run_dir / "overrides.json")
        places = LevelPlaces(root, s.bounds, self.ledger.owners, self.ledger.levels_taken)
        self.enforcer = Enforcer(self.ledger, workloads, self.nvml.devices, s.overcommit, found.older, places)
        self.enforcer.answered.forget_earlier()
        self.enforcer.names.keep_in(self.settings.run_dir / TENANT_NAMES, workloads.cgroup)
        gone = GoneTenants(self.ledger, self.enforcer.names)
        self._stale_mounts = StaleMounts(workloads.pids, self.history, self.lacks)
        self.manager = Manager(workloads, self.enforcer, overrides, self.nvml.devices, self.history, gone)
        record = XidRecord(self.settings.run_dir / xid_record.FILE, xid_record.lifetime())
        tally = record.tally(self.settings.ignored_xids, self.nvml.devices)
        self.reconciler = Reconciler(self.nvml, self.ledger, self.enforcer.levels, tally)
        self.news = Newsreader(
            self.ledger, self.manager, self.history, self.reconciler.orphaned, lambda: self._truth().held,
            self.discovery.look_into,
        )  # fmt: skip
        self._adoption = Adoption(self._truth, self.ledger, self.enforcer, self.history, self._unwitnessed)
        overruns = Overruns(self.ledger.times.turns, self.enforcer.name_of, self.history)
        orphans = OrphanReports(self._truth, self.manager, self.keepers, self.history)
        contexts, lacks = found.contexts, self.lacks
        late = LateDevices(self.nvml, self.ledger, self.manager, self.reconciler, self.history, contexts, lacks)
        killer = BypassKiller(self._truth, self.ledger, self.enforcer, self._unwitnessed, self.history)
        self.chores += [
            overrides.write_again, self._adoption.look, overruns.look, XidNews(self._truth, self.history).look,
            orphans.look, killer.look, late.look, lambda: record.keep(self._truth().xids, self.nvml.devices),
        ]  # fmt: skip
        self._policies = Policies(self.settings.policy_folder, self.manager, self.history)
        self._policies.begin(found.policies)
        take_up(self.ledger, self.manager, gone)
        self.ledger.times.tell()
        self._look_at_tenants()

    def _inject(self) -> None:
        """What containers are given when they start. A host where that cannot be written still enforces."""
        s = self.settings
        try:
            helper = s.helper if s.store is None else inject.publish_helper(s.helper)
            parts = inject.parts(s.run_dir, self.shim, helper)
            inject.set_up(parts, s.cdi_folder, [*s.shares, *profiles.names(s.profiles, self.nvml.devices)])
            self.parts = parts
        except (OSError, ValueError) as error:
            log.error("containers can ask for no share (%s): give the agent a cdiFolder that it may write", error)

    def _follow(self) -> None:
        """From now on: what the kernel tells, the gatekeeper asks, NVML says and the files change to."""
        assert self.reconciler
        assert self._policies
        fd = self.discovery.listen(self.settings.run_dir / "discover.sock")
        self.selector.register(fd, selectors.EVENT_READ, self._look_at_named)
        self.selector.register(self.discovery, selectors.EVENT_READ, self.discovery.take)
        self.selector.register(self.news, selectors.EVENT_READ, self.news.read)
        self.selector.register(self.enforcer, selectors.EVENT_READ, self.enforcer.take_over_late)
        self.selector.register(self.reconciler, selectors.EVENT_READ, self._look_at_holders)
        self.selector.register(self._policies, selectors.EVENT_READ, self._policies.take)
        self.selector.register(self.engines, selectors.EVENT_READ, self._look_at_answered)
        self._policies.start()
        self.reconciler.start(ROUND_SECONDS)

    def wait_for_gatekeeper(self) -> None:
        """AgentError: none came up."""
        if not self.keeper.wait():
            raise AgentError("the gatekeeper does not come up: see its lines above")

    # -- life

    def end(self, *_: object) -> None:
        """Leave run() at the next tick; for signal handlers too."""
        self._ended = True

    def reload(self) -> tuple[Fault, ...]:
        """Reads the policies again; returns the errors because of which the last good set stays in force."""
        return self._policies.ask() if self._policies else ()

    def lacks_policies(self) -> str:
        """Why no policies are enforced but what was pinned; empty: they are."""
        return self._policies.trouble if self._policies and self.manager.policies_unknown else ""

    def reload_soon(self, *_: object) -> None:
        """At the next tick; for SIGHUP, whose handler may come in the middle of anything."""
        self._reload_wanted = True

    def round_soon(self, *_: object) -> None:
        """A round at the next tick; for SIGCHLD: it may be the gatekeeper that has ended."""
        self._next_round = 0.0

    def run(self) -> None:
        """Ticks until end(): whenever something happens, and for a round."""
        come_first()
        heap.settle(AHEAD_BYTES)
        watchdog = notify.Watchdog()
        next_scan = time.monotonic() + RESCAN_SECONDS
        while not self._ended:
            for key, _ in self.selector.select(max(0.0, self._next_round - time.monotonic())):
                self._do(key.data)
            watchdog.ping()
            if self._ended:
                break
            if self._reload_wanted:
                self._reload_wanted = False
                self._do(self.reload)
            now = time.monotonic()
            if now >= self._next_round:
                self._round(now)
                if now >= next_scan or self.news.lost():
                    next_scan = now + RESCAN_SECONDS
                    self._do(self.rescan)
                    self._do(heap.give_back)

    def _round(self, now: float) -> None:
        """What nobody tells of."""
        self._next_round = now + ROUND_SECONDS
        for chore in (*self.chores, self.keeper.keep):
            self._do(chore)
        if self.keeper.is_missed:
            self._next_round = now + HURRY_SECONDS
        tidies = (self.manager.tidy_late, self.manager.gone.tidy, self.manager.retry_refused, self.ledger.owners.trim)
        for part in (*tidies, self.discovery.mend, self.discovery.keep, self.engines.keep):
            self._do(part)

    def _do(self, what: Callable[[], object]) -> None:
        """One part's mistake must not end the others; limits stand in the kernel either way."""
        try:
            what()
        except Exception:
            self.failures += 1
            log.exception("failed, and goes on")

    def rescan(self) -> None:
        """Looks at everything: for what no event told."""
        self.manager.tidy_all()
        self.manager.consider_all()
        self.engines.rescanned()
        self.news.follow_all()
        self.discovery.look_around()
        self._look_at_tenants()
        self.manager.sweep()
        self._lists.sweep()

    def _look_at_tenants(self) -> None:
        """At each one's first process, which may have begun when no agent was there, and at its orphaned bytes."""
        assert self.reconciler
        for tenant in self.enforcer:
            self.reconciler.orphaned(tenant.cgroup)
            for pid in self.manager.workloads.pids(tenant.path)[:1]:
                self.discovery.look_into(pid)
        self._stale_mounts.look(self.enforcer)

    def _look_at_holders(self) -> None:
        """Probe the libraries of processes that NVML lists; those that hold more than was seen may hide one."""
        assert self.reconciler
        self.reconciler.hush()
        truth = self._truth()
        self.discovery.look_at_holders(truth.pids(), truth.drift, truth.processes)
        self._adoption.look()

    def look(self) -> Snapshot:
        """A Snapshot of this moment."""
        found = take_snapshot(
            self.ledger, self.enforcer, self.nvml.devices, self._truth(), self.settings.run_dir, self._policies,
            self.discovery, self._reasons, self.manager.gone, self._unwitnessed, self.keepers,
        )  # fmt: skip
        self.snapshot = replace(
            found, writes_refused=self.writes_refused, failures=self.failures, engines=self.engines.views(),
            incomplete=doubts(self._policies.trouble if self._policies else "", self.enforcer),
            libraries=self.discovery.libraries(self.enforcer.name_at), trusted=self.settings.trusted_drivers,
            lacks={name: (check.found, check.mend) for name, check in self.lacks.items()},
        )  # fmt: skip
        self._taken = time.monotonic()
        return self.snapshot

    def fresh(self) -> Snapshot:
        """The last Snapshot, or one of this moment where that is too old to be shown."""
        return self.snapshot if time.monotonic() - self._taken < SNAPSHOT_SECONDS else self.look()

    def _truth(self) -> Truth:
        return self.reconciler.truth if self.reconciler else Truth()

    def stop(self) -> None:
        """Ends what this agent started, however far it came; what is in force stays so."""
        for part in (self._policies, self.engines, self.reconciler, self.keeper):
            if part:
                self._do(part.stop)

    def _look_at_answered(self) -> None:
        """Of cgroups that an engine has named: another policy may be theirs, or their own label count."""
        self.manager.consider(self.engines.take())

    def _look_at_named(self) -> None:
        """Of processes that the gatekeeper names: probe their files, decide about their cgroups."""
        for pids in self.discovery.named():
            for pid in pids:
                self.discovery.look_at(pid)
            paths = {path for pid in pids if (path := procfs.cgroup_path(pid)) is not None}
            # They may be newer than what the kernel's events have told.
            lacking = self.manager.consider({above for path in paths for above in procfs.and_above(path)})
            for path in paths:
                self.enforcer.answer(path, lacking)

    def detach(self) -> None:
        """Opens everything and leaves the host as it was; run() ends."""
        self.stop()
        take_away(self.settings.run_dir, self.settings.pins, by_agent=True)
        self.end()
