"""The work that the agent does once in every round, apart from the maintenance of the agent's own parts.

The steps are made at the agent's start and run in the agent's main loop. Most steps add new events to the event log.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

from fgpu_ebpf.agent.bypass_killer import BypassKiller
from fgpu_ebpf.agent.denied_opens import DeniedOpens
from fgpu_ebpf.agent.idle_parking import IdleParking
from fgpu_ebpf.agent.late_devices import LateDevices
from fgpu_ebpf.agent.nvml_reconcile import Reconciler, Truth
from fgpu_ebpf.agent.parkable import Parkable, PromptNvml
from fgpu_ebpf.agent.parking import Parking
from fgpu_ebpf.agent.reporters import AdoptionReports, OrphanReports, OverrunReports, XidReports
from fgpu_ebpf.agent.room_requests import RoomRequests
from fgpu_ebpf.agent.settings import Settings
from fgpu_ebpf.agent.shortfalls import Shortfalls
from fgpu_ebpf.agent.usage_meter import UsageMeter
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver.descriptor_holders import Keepers
from fgpu_ebpf.driver.host_driver import HostDriver
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.unwitnessed_memory import Unwitnessed
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.usage_store import Writer


@dataclass(frozen=True, slots=True)
class Chores:
    """The steps of a round in the order of execution, and the objects of these steps that other modules use too."""

    steps: tuple[Callable[[], object], ...]
    adoption: AdoptionReports
    shortfalls: Shortfalls
    unwitnessed: Unwitnessed
    keepers: Keepers
    usage: UsageMeter
    parking: Parking
    idle_parking: IdleParking
    room_requests: RoomRequests | None


def make_chores(
    driver: HostDriver, ledger: Ledger, manager: Manager, reconciler: Reconciler, history: EventLog,
    failed_checks: MutableMapping[str, Check], settings: Settings, opens: DeniedOpens,
) -> Chores:  # fmt: skip
    """Make the steps of a round.

    Args:
        failed_checks: the agent's failed checks by name, which some steps change.
        settings: the agent's settings.
    """

    def truth() -> Truth:
        return reconciler.truth

    def uuid(device: int) -> str:
        return next((d.uuid_text for d in driver.nvml.devices if d.index == device), str(device))

    def limit_in_driver() -> None:
        if reconciler.driver_limits:
            root, margin = manager.workloads.root, settings.module_bytes
            reconciler.driver_limits.publish(manager.enforcer, root, margin, failed_checks)

    enforcer, turns = manager.enforcer, ledger.times.turns
    unwitnessed, keepers = Unwitnessed(driver.contexts, settings.module_bytes), Keepers()
    adoption = AdoptionReports(truth, ledger, enforcer, history, unwitnessed)
    late = LateDevices(driver.nvml, ledger, manager, reconciler, history, driver.contexts, failed_checks)
    shortfalls = Shortfalls(turns, enforcer.name_of, history)
    usage = UsageMeter(truth, ledger, enforcer, uuid, Writer(), failed_checks)
    parkable = Parkable(
        settings.parking, manager.workloads.root, ledger, PromptNvml(driver.nvml), enforcer,
        lambda: unwitnessed.find(truth().processes, truth().orphans),
    )  # fmt: skip
    parking = Parking(settings.run_dir, parkable, history, failed_checks)
    idle_parking = IdleParking(parking, truth, history, failed_checks)
    room_requests = (
        RoomRequests.of_host(settings.run_dir, parking, idle_parking, history) if settings.makes_room else None
    )
    steps = (
        manager.overrides.write_again,
        limit_in_driver,
        adoption.look,
        OverrunReports(turns, enforcer.name_of, history).look,
        shortfalls.look,
        XidReports(truth, history).look,
        OrphanReports(truth, manager, keepers, history).look,
        BypassKiller(truth, ledger, enforcer, unwitnessed, history, settings.run_dir / BypassKiller.FILE).look,
        late.look,
        opens.look,
        usage.look,
        parking.look,
        idle_parking.look,
        *([room_requests.look] if room_requests else []),
        lambda: driver.xids.keep(truth().xids, driver.nvml.devices),
    )
    return Chores(steps, adoption, shortfalls, unwitnessed, keepers, usage, parking, idle_parking, room_requests)
