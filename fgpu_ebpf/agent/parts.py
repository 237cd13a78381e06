"""Make the parts of a running agent, and connect the parts that call each other.

This module runs once, at the agent's start, in the main thread. The main loop then calls the parts.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

from fgpu_ebpf.agent.cgroup_looks import HostLook
from fgpu_ebpf.agent.chores import Chores, make_chores
from fgpu_ebpf.agent.denied_opens import DeniedOpens
from fgpu_ebpf.agent.kernel_events import KernelEvents
from fgpu_ebpf.agent.nvml_reconcile import Reconciler
from fgpu_ebpf.agent.policy_reload import Policies
from fgpu_ebpf.agent.reporters import StaleMountReports
from fgpu_ebpf.agent.settings import Settings
from fgpu_ebpf.agent.sliced_looks import Looks
from fgpu_ebpf.agent.startup import Attached
from fgpu_ebpf.check import Check
from fgpu_ebpf.containers.injection import Lists
from fgpu_ebpf.driver.host_driver import HostDriver
from fgpu_ebpf.kubernetes.nvidia_claims import NvidiaClaims
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.pinned_levels import take_up
from fgpu_ebpf.workloads.engine_labels import Engines


class Parts(NamedTuple):
    """The parts of the agent process. `look` scans cgroups in steps; `looks` has the requested and running scans."""

    driver: HostDriver
    ledger: Ledger
    manager: Manager
    policies: Policies
    reconciler: Reconciler
    events: KernelEvents
    look: HostLook
    looks: Looks
    chores: Chores
    claims: NvidiaClaims

    @property
    def enforcer(self) -> Enforcer:
        """The tenants, and the limits and shares that are in force for the tenants."""
        return self.manager.enforcer

    def take_over(self) -> None:
        """Match the pinned levels with policies and overrides, put the result in force, and scan each tenant once."""
        take_up(self.ledger, self.manager, self.manager.gone)
        self.ledger.times.tell()
        for tenant in self.enforcer:
            self.reconciler.orphaned(tenant.cgroup)
        for _ in self.look.tenants():
            pass


def wire(
    settings: Settings,
    attached: Attached,
    engines: Engines,
    history: EventLog,
    failed_checks: MutableMapping[str, Check],
) -> Parts:
    """Make the parts, and pass to each part the other parts that it calls.

    Only one part starts a thread in this function: the thread that writes the store of `fgpu usage`.

    Args:
        failed_checks: the agent's failed checks, which some parts change.
    """
    driver, ledger, discovery = attached.driver, attached.ledger, attached.driver.discovery
    devices, older = driver.nvml.devices, attached.preexisting
    claims = NvidiaClaims(settings.kubelet_folder, engines, failed_checks)
    namer = claims.namer(settings.adapters)
    manager = Manager.of_host(
        settings.run_dir, ledger, namer, history, devices, older, settings.bounds, settings.overcommit
    )
    manager.classes, manager.adapters = settings.priorities, settings.adapters
    manager.metric_labels = settings.metric_labels
    ledger.times.set_concurrent(settings.concurrent(devices))
    tally = driver.xids.tally(settings.ignored_xids, devices)
    ran = older if driver.layout_changed else ()
    reconciler = Reconciler(
        driver.nvml, ledger, manager.enforcer.levels, tally, ran, settings.run_dir, settings.driver_root
    )
    events = KernelEvents(
        ledger,
        manager,
        history,
        reconciler.orphaned,
        lambda: reconciler.truth.held,
        discovery.look_into,
        discovery.explain,
    )
    opens = DeniedOpens(
        ledger, lambda: reconciler.truth, manager.enforcer, lambda: discovery.opens_fault,
        failed_checks,
    )  # fmt: skip
    stale_mounts = StaleMountReports(manager.workloads.pids, history, failed_checks)
    look = HostLook(manager, events, engines, discovery, stale_mounts, Lists(settings.run_dir))
    chores = make_chores(driver, ledger, manager, reconciler, history, failed_checks, settings, opens)
    if chores.room_requests:
        events.lacks = chores.room_requests.ask
    return Parts(
        driver, ledger, manager,
        Policies(settings.policy_folder, attached.policies, manager, history),
        reconciler, events, look, Looks(look.steps),
        chores, claims,
    )  # fmt: skip
