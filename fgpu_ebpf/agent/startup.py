"""The steps of the agent's start: what is prepared, attached and made before the main loop runs.

Used by `agent.Agent.start`, in the main thread of the agent process. Each step returns what it has made as a frozen
dataclass. `wire` shows which part of the agent calls which.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf.agent.bypass_killer import BypassKiller
from fgpu_ebpf.agent.cgroup_looks import HostLook
from fgpu_ebpf.agent.detach import TENANT_NAMES
from fgpu_ebpf.agent.kernel_events import KernelEvents
from fgpu_ebpf.agent.late_devices import LateDevices
from fgpu_ebpf.agent.nvml_reconcile import Reconciler, Truth
from fgpu_ebpf.agent.policy_reload import Policies, Start, at_start
from fgpu_ebpf.agent.reporters import AdoptionReports, OrphanReports, OverrunReports, StaleMountReports, XidReports
from fgpu_ebpf.agent.settings import Settings
from fgpu_ebpf.agent.shortfalls import Shortfalls
from fgpu_ebpf.agent.sliced_looks import Looks
from fgpu_ebpf.check import Check
from fgpu_ebpf.containers import cdi, injection
from fgpu_ebpf.driver import attach, nvml, other_layouts, programs, shim_store, xid_record
from fgpu_ebpf.driver.bypass_reason import Reasons
from fgpu_ebpf.driver.context_sizes import context_bytes
from fgpu_ebpf.driver.descriptor_holders import Keepers
from fgpu_ebpf.driver.device_indexes import pinned
from fgpu_ebpf.driver.discovery import Discovery
from fgpu_ebpf.driver.library_files import driver_libraries
from fgpu_ebpf.driver.probe_plan import look_up
from fgpu_ebpf.driver.start_checks import AgentError, check_kernel
from fgpu_ebpf.driver.xid_record import XidRecord
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.unwitnessed_memory import Unwitnessed
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.tenancy import profiles
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.gone_tenants import GoneTenants
from fgpu_ebpf.tenancy.level_capacity import LevelCapacity
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.overrides import Overrides
from fgpu_ebpf.tenancy.pinned_levels import take_up
from fgpu_ebpf.tenancy.preexisting import PreexistingProcesses
from fgpu_ebpf.workloads.cgroups import Workloads
from fgpu_ebpf.workloads.engine_labels import Engines

log = logging.getLogger("fgpu.agent")
STATE = Path("/var/lib/fgpu/contexts.json")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Parts that a start has made before it attaches probes. `contexts`: bytes of one context by ledger index."""

    digest: str
    libraries: list[Path]
    release: shim_store.Release
    nvml: nvml.Nvml
    contexts: dict[int, int]
    policies: Start
    preexisting: PreexistingProcesses


@dataclass(frozen=True, slots=True)
class Attached:
    """Parts that a start has made when all probes are attached. `shim`: the published file; `lacks`: failed checks."""

    discovery: Discovery
    shim: Path
    lacks: Mapping[str, Check]
    layout_changed: bool


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a running agent. `chores`: functions to call in every round."""

    enforcer: Enforcer
    manager: Manager
    reconciler: Reconciler
    events: KernelEvents
    look: HostLook
    looks: Looks
    adoption: AdoptionReports
    policies: Policies
    reasons: Reasons
    unwitnessed: Unwitnessed
    keepers: Keepers
    shortfalls: Shortfalls
    chores: tuple[Callable[[], object], ...]


def prepare(settings: Settings, mark: Callable[[str], None]) -> Prepared:
    """Prepare everything that needs no BPF programs while they are compiled. Raises the errors of the parts.

    Args:
        mark: called with the name of each part of the start that is done.
    """
    root = settings.driver_root
    libraries = driver_libraries(root, "libcuda.so.1")
    if not libraries:
        nvml.Nvml(root)  # its error is better if there is no driver at all
        raise AgentError(f"no libcuda.so.1 under {root}: install the driver's CUDA library")
    loading = programs.Loading(settings.sources, settings.pins, settings.loader)
    try:
        devices = nvml.Nvml(root, pinned(settings.pins))
        mark("devices")
        contexts = context_bytes(devices, libraries[0], STATE)
        check_kernel(loading, settings.shim)
        release = shim_store.Release(settings.shim, settings.store)
        look_up([release.file, *libraries])
        policies = at_start(settings.policy_folder)
        older = PreexistingProcesses.found(settings.run_dir, bool(other_layouts.folders(settings.pins)))
        mark("prepared")
        return Prepared(loading.wait(), libraries, release, devices, contexts, policies, older)
    finally:
        loading.end()


def attach_probes(settings: Settings, prepared: Prepared, ledger: Ledger) -> Attached:
    """Name the devices in the ledger, and attach probes to every file in use. Raises the errors of the parts."""
    for device in prepared.nvml.devices:
        ledger.set_device(device.index, device.uuid)
        ledger.set_context_bytes(device.index, prepared.contexts[device.index])
    probes = attach.Probes(settings.pins, prepared.digest, ledger)
    probes.attach_process_ends()
    discovery, shim, lacks = _publish(settings, prepared, probes)
    return Attached(discovery, shim, lacks, other_layouts.take_over(settings.pins, ledger))


def _publish(
    settings: Settings, prepared: Prepared, probes: attach.Probes
) -> tuple[Discovery, Path, Mapping[str, Check]]:
    """Probe the shim before publishing it: programs that start before that get the previous version."""
    store, release = settings.store, prepared.release
    discovery = Discovery.of_host(
        probes, prepared.libraries, release.files(), store, settings.trusted_drivers, settings.bounds.files
    )
    used = discovery.start()
    shim = release.publish()
    lacks = release.lacks()
    if store and used is not None:
        with contextlib.suppress(OSError):  # old versions only take disk space
            shim_store.retire(store, used)
    return discovery, shim, lacks


def wire(
    settings: Settings, prepared: Prepared, attached: Attached, ledger: Ledger, engines: Engines, history: EventLog,
    lacks: MutableMapping[str, Check],
) -> Parts:  # fmt: skip
    """Make the parts that manage tenants, and give each the parts that it calls. Nothing is started.

    Args:
        lacks: the agent's failed checks, which some parts change.
    """
    devices, discovery = prepared.nvml.devices, attached.discovery
    manager = _manager(settings, prepared, ledger, engines, history)
    enforcer = manager.enforcer
    record = XidRecord(settings.run_dir / xid_record.FILE, xid_record.lifetime())
    ran = prepared.preexisting if attached.layout_changed else ()
    tally = record.tally(settings.ignored_xids, devices)
    reconciler = Reconciler(prepared.nvml, ledger, enforcer.levels, tally, ran)

    def truth() -> Truth:
        return reconciler.truth

    orphaned = reconciler.orphaned
    events = KernelEvents(ledger, manager, history, orphaned, lambda: truth().held, discovery.look_into)
    stale_mounts = StaleMountReports(manager.workloads.pids, history, lacks)
    lists = injection.Lists(settings.run_dir)
    look = HostLook(manager, events, engines, discovery, orphaned, stale_mounts, lists)
    unwitnessed, keepers = Unwitnessed(prepared.contexts), Keepers()
    adoption = AdoptionReports(truth, ledger, enforcer, history, unwitnessed)
    late = LateDevices(prepared.nvml, ledger, manager, reconciler, history, prepared.contexts, lacks)
    shortfalls = Shortfalls(ledger.times.turns, enforcer.name_of, history)
    chores = (
        manager.overrides.write_again,
        adoption.look,
        OverrunReports(ledger.times.turns, enforcer.name_of, history).look,
        shortfalls.look,
        XidReports(truth, history).look,
        OrphanReports(truth, manager, keepers, history).look,
        BypassKiller(truth, ledger, enforcer, unwitnessed, history).look,
        late.look,
        lambda: record.keep(truth().xids, devices),
    )
    return Parts(
        enforcer, manager, reconciler, events, look, Looks(look.steps), adoption,
        Policies(settings.policy_folder, manager, history), Reasons(discovery.is_shim, discovery.hidden), unwitnessed,
        keepers, shortfalls, chores,
    )  # fmt: skip


def _manager(settings: Settings, prepared: Prepared, ledger: Ledger, engines: Engines, history: EventLog) -> Manager:
    root, devices = procfs.cgroup2_root(), prepared.nvml.devices
    assert root  # checked by host_checks()
    workloads = Workloads(root, engines)
    overrides = Overrides(settings.run_dir / "overrides.json")
    capacity = LevelCapacity(root, settings.bounds, ledger.owners, ledger.levels_taken)
    enforcer = Enforcer(ledger, workloads, devices, settings.overcommit, prepared.preexisting, capacity)
    enforcer.answered.forget_earlier()
    enforcer.names.keep_in(settings.run_dir / TENANT_NAMES, workloads.cgroup)
    return Manager(workloads, enforcer, overrides, devices, history, GoneTenants(ledger, enforcer.names))


def take_over(parts: Parts, prepared: Prepared, ledger: Ledger) -> None:
    """Bring the kernel's levels, the policies and the overrides together, and look at each tenant once."""
    parts.policies.begin(prepared.policies)
    take_up(ledger, parts.manager, parts.manager.gone)
    ledger.times.tell()
    for _ in parts.look.tenants():
        pass


def set_up_containers(settings: Settings, shim: Path, devices: Sequence[nvml.Device]) -> cdi.Parts | None:
    """Write the files that containers get at their start. None: they cannot be written; limits are still enforced."""
    try:
        helper = settings.helper if settings.store is None else injection.publish_helper(settings.helper)
        parts = injection.parts(settings.run_dir, shim, helper)
        injection.set_up(parts, settings.cdi_folder, [*settings.shares, *profiles.names(settings.profiles, devices)])
    except (OSError, ValueError) as error:
        log.error("containers cannot ask for shares (%s): set cdiFolder to a writable folder", error)
        return None
    return parts
