"""The agent, which puts limits in force, keeps probes and the ledger up to date, and takes Snapshots on request.

This main module of the agent process runs in the main thread. The agent has no part in an allocation, which BPF
programs admit. When the agent ends, limits stay in force in the kernel, and the next agent takes over the pinned maps.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Callable
from dataclasses import replace

from fgpu_ebpf.agent import startup
from fgpu_ebpf.agent.detach import NAMES, take_away
from fgpu_ebpf.agent.device_release import DeviceRelease
from fgpu_ebpf.agent.gatekeeper_process import GatekeeperProcess
from fgpu_ebpf.agent.parts import Parts, wire
from fgpu_ebpf.agent.settings import Settings
from fgpu_ebpf.agent.snapshot_builder import take_snapshot
from fgpu_ebpf.check import Check
from fgpu_ebpf.containers import cdi, run
from fgpu_ebpf.driver.library_files import driver_files
from fgpu_ebpf.driver.start_checks import AgentError
from fgpu_ebpf.linux import malloc, procfs, sd_notify
from fgpu_ebpf.linux.process_setup import raise_descriptor_limit, raise_priority
from fgpu_ebpf.policy.yaml_document import ConfigError
from fgpu_ebpf.snapshot import Snapshot
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.workloads.engine_labels import Engines, api_of

log = logging.getLogger("fgpu.agent")
ROUND_SECONDS = 1.0
HURRY_SECONDS = 0.1  # the period of rounds while there is no gatekeeper
SNAPSHOT_SECONDS = 1.0  # the maximum age of a Snapshot that is shown
AHEAD_BYTES = 1 << 20  # heap kept for small objects: enough for requests, scrapes and rescans at the same time


class Agent:
    """The agent of a host. A lock file keeps a second agent from starting."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.snapshot = Snapshot(time.time())
        self._taken, self._next_round = -SNAPSHOT_SECONDS, 0.0
        self.selector = selectors.DefaultSelector()
        # `failed_checks`: by name, without missing probes, which Snapshot.unenforced reports.
        self.history, self.failed_checks = EventLog(), dict[str, Check]()
        self.gatekeeper = GatekeeperProcess(settings.run_dir, settings.pins)
        self.engines = Engines(map(api_of, settings.engines), settings.run_dir / NAMES)
        self._parts: Parts | None = None
        self.given: cdi.Parts | None = None  # the files that containers get, or None if a file could not be written
        self._given_devices = -1  # the number of devices in these files; -1: a file could not be written
        self._given_error = ""  # the error of the last attempt to write them
        self.marks: dict[str, float] = {}  # monotonic time at which each part of the start was done
        self._ended = self._reload_wanted = False
        self.failures = self.writes_refused = 0
        self.chores: list[Callable[[], object]] = []  # functions to call in every round

    @property
    def parts(self) -> Parts:
        """The parts that start() has made."""
        assert self._parts
        return self._parts

    # -- start

    def start(self) -> None:
        """Take the lock, load the programs, attach the probes, and put known limits in force.

        Raises:
            AgentError: the text names the missing requirement, and its fix.
        """
        settings = self.settings
        settings.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._lock_file = startup.take_lock(settings.run_dir)
        raise_descriptor_limit()
        files = driver_files(settings.driver_root)
        attached = startup.attach(settings, self.mark, self.gatekeeper.start)
        driver = attached.driver
        self.failed_checks |= driver.failed_checks
        self.gatekeeper.start(driver.layout_changed)
        self._parts = wire(settings, attached, self.engines, self.history, self.failed_checks)
        self.devices = DeviceRelease(self.parts.reconciler, files, self.history, self.failed_checks)
        self.chores += (*self.parts.chores.steps, self.devices.look, self.parts.claims.look, self.set_up_containers)
        self.parts.take_over()
        run.write_preloads(settings.run_dir, driver.shim)
        self._follow()
        self.set_up_containers()
        self.mark("in force")

    def set_up_containers(self) -> None:
        """Write the files that containers get, at the start and after NVML has found another device.

        After a failure, the next round tries again.
        """
        driver, devices = self.parts.driver, len(self.parts.driver.nvml.devices)
        if devices == self._given_devices:
            return
        self.given, self._given_devices = None, -1
        try:
            overrides = self.parts.manager.overrides
            self.given = startup.set_up_containers(self.settings, driver.shim, driver.nvml.devices, overrides)
            self._given_devices, self._given_error = devices, ""
        except (OSError, ValueError) as error:
            if str(error) != self._given_error:
                self._given_error = str(error)
                log.error("containers cannot request shares (%s): set cdiFolder to a writable folder", error)

    def mark(self, part: str) -> None:
        """Record that a part of the start is done."""
        self.marks[part] = time.monotonic()

    def _follow(self) -> None:
        """Register all sources of events for the main loop: the kernel, the gatekeeper, NVML, policies and engines."""
        parts, discovery = self.parts, self.parts.driver.discovery
        fd = discovery.listen(self.settings.run_dir / "discover.sock")
        self.selector.register(fd, selectors.EVENT_READ, self._look_at_named)
        self.selector.register(discovery, selectors.EVENT_READ, discovery.take)
        self.selector.register(parts.events, selectors.EVENT_READ, parts.events.read)
        self.selector.register(parts.enforcer.moves, selectors.EVENT_READ, parts.enforcer.moves.take_over_late)
        self.selector.register(parts.reconciler, selectors.EVENT_READ, self._look_at_holders)
        self.selector.register(parts.policies, selectors.EVENT_READ, parts.policies.take)
        self.selector.register(self.engines, selectors.EVENT_READ, self._look_at_answered)
        self.selector.register(parts.claims, selectors.EVENT_READ, self._look_at_booked)
        parts.policies.start()
        parts.chores.parking.begin(self.selector)
        parts.reconciler.start(ROUND_SECONDS)

    def wait_for_gatekeeper(self) -> None:
        """Wait until the gatekeeper accepts connections.

        Raise AgentError if no connection is accepted within UP_SECONDS.
        """
        if not self.gatekeeper.wait():
            raise AgentError("the gatekeeper did not start: see its log above")

    # -- the main loop

    def end(self, *_: object) -> None:
        """Make run() return after the current step. Signal handlers may call this method at any point."""
        self._ended = True

    def reload(self) -> tuple[ConfigError, ...]:
        """Read the policies again, and return the errors. After an error the last good policy set stays in force."""
        return self.parts.policies.ask()

    def policy_error(self) -> str:
        """Return why pinned limits are enforced instead of policies, or an empty text while policies are enforced."""
        return self.parts.policies.trouble if self.parts.manager.policies_unknown else ""

    def reload_soon(self, *_: object) -> None:
        """Make the main loop reload the policies soon. The handler of SIGHUP may call this method at any point."""
        self._reload_wanted = True

    def round_soon(self, *_: object) -> None:
        """Make the main loop do a round soon.

        The handler of SIGCHLD calls this method, because the gatekeeper may have ended.
        """
        self._next_round = 0.0

    def run(self) -> None:
        """Run the main loop until end() is called: handle events, and do a round every ROUND_SECONDS.

        Raises:
            AgentError: the driver was replaced during a release of the devices, so the agent must restart.
        """
        raise_priority()
        malloc.settle(AHEAD_BYTES)
        watchdog, looks = sd_notify.Watchdog(), self.parts.looks
        while not self._ended:
            for key, _ in self.selector.select(looks.wait(self._next_round - time.monotonic())):
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
            self._do(looks.go_on)
            self._ended = self._ended or bool(self.devices.fault)
        if self.devices.fault:
            raise AgentError(self.devices.fault)

    def _round(self, now: float) -> None:
        """Do the periodic work that no event triggers."""
        self._next_round = now + ROUND_SECONDS
        for chore in (*self.chores, self.gatekeeper.keep):
            self._do(chore)
        if self.gatekeeper.is_missed:
            self._next_round = now + HURRY_SECONDS
        manager, discovery = self.parts.manager, self.parts.driver.discovery
        for part in (
            manager.remove_not_entered, manager.gone.release_freed, manager.retry_refused,
            self.parts.ledger.owners.trim, discovery.reattach, discovery.keep, self.engines.keep, self._ask_for_looks,
        ):  # fmt: skip
            self._do(part)

    def _do(self, step: Callable[[], object]) -> None:
        """Run one step. If the step raises an error, log and count the error, so that the other steps still run.

        Limits stay in force in the kernel after an error.
        """
        try:
            step()
        except Exception as error:
            self.failures += 1
            is_short = isinstance(error, OSError) and error.errno in procfs.SHORTAGES
            name = getattr(step, "__qualname__", repr(step))
            log.error(
                "main loop: %s failed; the agent continues: %s", name, error, exc_info=None if is_short else error
            )

    def _ask_for_looks(self) -> None:
        """Request scans of the workloads with lost cgroup events, and begin the scans that are due."""
        for path in self.parts.events.lost():
            self.parts.looks.ask(path)
        self.parts.looks.keep()

    def _look_at_holders(self) -> None:
        """Probe the libraries of the processes that NVML lists, and report adopted processes.

        A listed process may have mapped a copy of libcuda that has no probes yet.
        """
        parts = self.parts
        parts.reconciler.clear()
        truth = parts.reconciler.truth
        parts.driver.discovery.look_at_holders(truth.pids(), truth.drift, truth.processes)
        parts.chores.adoption.look()

    def look(self) -> Snapshot:
        """Return a new Snapshot. If the present state cannot be read, mark the last Snapshot, and raise the error."""
        try:
            taken = take_snapshot(self.parts, self.settings.run_dir)
        except Exception as error:
            why = f"the present state cannot be read: {error or type(error).__name__}"
            self.snapshot = replace(self.snapshot, incomplete=why)
            raise
        self.snapshot = replace(
            taken, writes_refused=self.writes_refused,
            failures=self.failures, engines=self.engines.views(), trusted=self.settings.trusted_drivers,
            lacks={name: (check.found, check.fix) for name, check in self.failed_checks.items()},
        )  # fmt: skip
        self._taken = time.monotonic()
        return self.snapshot

    def fresh(self) -> Snapshot:
        """Return the last Snapshot, or a new Snapshot if the last Snapshot is older than SNAPSHOT_SECONDS."""
        return self.snapshot if time.monotonic() - self._taken < SNAPSHOT_SECONDS else self.look()

    def stop(self) -> None:
        """Stop all parts that this agent has started, even after an incomplete start. Limits stay in force."""
        made = self._parts
        of_parts = (made.policies, made.reconciler, made.chores.usage, made.chores.parking) if made else (None,) * 4
        policies, reconciler, usage, parking = of_parts
        for part in (policies, self.engines, parking, reconciler, usage, self.gatekeeper):
            if part:
                self._do(part.stop)

    def _look_at_answered(self) -> None:
        """Reconsider cgroups for which an engine has reported labels, because the policy or limits may have changed."""
        self.parts.manager.consider(self.engines.take())

    def _look_at_booked(self) -> None:
        """Reconsider cgroups of pods for which the scheduler has booked sizes that differ from the limits in force."""
        self.parts.manager.consider(self.parts.claims.take())

    def _look_at_named(self) -> None:
        """Probe the files of processes that the gatekeeper has reported, and decide about the processes' cgroups."""
        manager, discovery = self.parts.manager, self.parts.driver.discovery
        for pids in discovery.named():
            for pid in pids:
                discovery.look_at(pid)
            paths = {path for pid in pids if (path := procfs.cgroup_path(pid)) is not None}
            # The kernel events about new cgroups may not have been read yet.
            lacking = manager.consider({above for path in paths for above in procfs.and_above(path)})
            for path in paths:
                manager.enforcer.answer(path, lacking)

    def detach(self) -> dict[str, int]:
        """Remove everything of fgpu from the host, and make run() return.

        Returns:
            `tenants`: the number of tenants that had a limit or a share of time.

        The caller has to ensure that no tenant is parked: after a detach, nothing wakes a parked tenant.
        """
        found = {"tenants": len(self.parts.enforcer)}
        self.stop()
        try:
            take_away(self.settings.run_dir, self.settings.pins)
        finally:
            self.end()  # an agent that has stopped its parts enforces nothing
        return found
