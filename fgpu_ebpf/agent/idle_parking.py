"""Park tenants automatically that have been idle for the time in their policies (`memory.park.after`).

This module runs in the agent's main loop, once a second, and does nothing if no policy with `memory.park.after`
applies. Signs of work are the counts of the kernel's ledger (changes of charges, requests, the calls that the shim
reports) and NVML's samples. `Parking` checks the stacks of a tenant before parking, and refuses a tenant with a thread
in the driver.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace

from fgpu_ebpf.agent.idle_tenants import Idleness, Look
from fgpu_ebpf.agent.nvml_reconcile import STALE_SECONDS, Truth
from fgpu_ebpf.agent.parkable import by_tenant, devices_of
from fgpu_ebpf.agent.parked_tenant import Errand
from fgpu_ebpf.agent.parking import Parking, ParkingError
from fgpu_ebpf.check import Check
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.policy.units import duration_text
from fgpu_ebpf.snapshot import ParkingView, plain
from fgpu_ebpf.tenancy import parking_text
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.tenant import Tenant

LOOK_SECONDS = 1.0
STAY_SECONDS = 10.0  # a tenant without work stays for at least this time, even if other tenants wait for the room
NAME = "idle tenants"
BUSY = f"busy in the last {STAY_SECONDS:.0f} s"
_FIX = "set `parking: on` in agent.yaml, and restart the agent"
_OFF = "memory.park of the policy has no effect: parking is off"


@dataclass(frozen=True, slots=True)
class Attempt:
    """An automatic parking that is in progress. `devices`: the devices that hold the tenant's memory."""

    tenant: Tenant
    devices: frozenset[int]
    errand: Errand


class IdleParking:
    """The automatic parking of all tenants.

    Args:
        parking: parks tenants, and has the tenants that do not run.
        truth: returns the last result of NVML.
        history: the event log.
        failed_checks: the agent's failed checks by name, which this class changes.
    """

    def __init__(
        self, parking: Parking, truth: Callable[[], Truth], history: EventLog, failed_checks: MutableMapping[str, Check]
    ) -> None:
        self._parking, self._truth, self._history, self._failed_checks = parking, truth, history, failed_checks
        self._ledger, self._enforcer = parking.parkable.ledger, parking.parkable.enforcer
        self._idleness, self._attempts, self._refused = Idleness(), dict[int, Attempt](), dict[int, str]()
        self._looked_at = float("-inf")

    def look(self) -> None:
        """Check all tenants with `memory.park.after`, at most once a second, and begin to park tenants that are due."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        tenants = {tenant.cgroup: tenant for tenant in self._enforcer if tenant.park.after_ns}
        self._refused = {cgroup: why for cgroup, why in self._refused.items() if cgroup in tenants}
        self._report(tenants)
        self._end_attempts(now)
        if not tenants or not self._parking.parkable.is_on:
            return
        processes = by_tenant(self._ledger)
        looks = {cgroup: self._look_at(now, tenant, processes[cgroup]) for cgroup, tenant in tenants.items()}
        for cgroup in self._idleness.look(now, looks):
            self.begin(now, tenants[cgroup], processes[cgroup])

    def _look_at(self, now: float, tenant: Tenant, own: Mapping[int, Process]) -> Look:
        signs = (
            frozenset((pid, p.generation, p.changes, p.begun) for pid, p in own.items()),
            tuple((u.called_ns, u.used, u.refused, u.admitted) for u in self._ledger.usage(tenant.cgroup) or ()),
        )
        return Look(_after(tenant), signs, self._parking.is_away(tenant.cgroup) or self._runs(now, own))

    def _runs(self, now: float, own: Mapping[int, Process]) -> bool:
        """Return whether the processes hold no memory, run kernels, or may run kernels as far as NVML reports."""
        truth, devices = self._truth(), _devices(own)
        if not devices or now - truth.sampled > STALE_SECONDS:
            return True
        percents = [truth.percent.get(device) for device in devices]
        return any(percent is None or any(percent.get(pid) for pid in own) for percent in percents)

    def begin(self, now: float, tenant: Tenant, own: Mapping[int, Process], purpose: str = "") -> bool:
        """Begin to park an idle tenant, unless a tenant on the same devices is being parked. The copies share the bus.

        An attempt with a result that stays unknown (`ParkedTenant.is_undecided`) does not prevent the next attempt.

        Args:
            now: the present time.
            tenant: the tenant, which is due by its policy or has no hindrance().
            own: all processes of the tenant, including processes without memory.
            purpose: why the tenant is parked earlier than its policy requires, for the event.

        Returns:
            Whether the parking has begun.
        """
        devices = _devices(own)
        undecided = {parked.cgroup for parked in self._parking.tenants() if parked.is_undecided}
        attempts = (a for cgroup, a in self._attempts.items() if cgroup in undecided and not a.errand.is_done)
        if any(devices & attempt.devices for attempt in attempts):
            return False
        why = f"idle for {duration_text(self._idleness.seconds(now, tenant.cgroup))}{purpose}"
        try:
            self._attempts[tenant.cgroup] = Attempt(tenant, devices, self._parking.park(tenant, why))
        except ParkingError as error:
            self._refuse(now, tenant, str(error))
            return False
        self._idleness.tried(tenant.cgroup)
        return True

    def idle_seconds(self, now: float, tenant: Tenant) -> float:
        """Return the seconds for which a tenant with `memory.park.after` in its policy has been idle."""
        return self._idleness.seconds(now, tenant.cgroup)

    def hindrance(self, now: float, tenant: Tenant, own: Mapping[int, Process]) -> str:
        """Return why a tenant must not be parked to make room for another tenant, or an empty text.

        The tenant's policy must have `memory.park.after`. Even if `after` is longer, STAY_SECONDS without work suffice.
        """
        if not tenant.park.after_ns:
            return "the policy does not park the tenant"
        if why := self._parking.parkable.obstacle(tenant, {pid: p for pid, p in own.items() if any(p.bytes)}):
            return why
        self._end_attempts(now)
        if self._idleness.is_due(now, tenant.cgroup, replace(self._look_at(now, tenant, own), after=STAY_SECONDS)):
            return ""
        refused = self._refused.get(tenant.cgroup, "")
        is_busy = not refused or self._idleness.seconds(now, tenant.cgroup) < STAY_SECONDS
        return "; ".join(filter(None, (BUSY if is_busy else "", refused and f"at the last attempt: {refused}")))

    def _end_attempts(self, now: float) -> None:
        for cgroup, attempt in list(self._attempts.items()):
            if attempt.errand.is_done:
                del self._attempts[cgroup]
                if attempt.errand.error:
                    self._refuse(now, attempt.tenant, attempt.errand.error)
                else:  # the tenant may have been woken since the last check
                    self._idleness.begin_anew(cgroup)
                    self._refused.pop(cgroup, None)

    def _refuse(self, now: float, tenant: Tenant, why: str) -> None:
        """Record why a tenant could not be parked.

        A reason that differs from the last reason only in numbers makes no event.
        """
        self._idleness.failed(now, tenant.cgroup)
        if _words(self._refused.get(tenant.cgroup, "")) != _words(why):
            self._history.add("not parked", tenant=tenant.name, text=why)
        self._refused[tenant.cgroup] = why

    def _report(self, tenants: Mapping[int, Tenant]) -> None:
        """Report, as a failed check, the policies whose `memory.park.after` has no effect."""
        policies = sorted({tenant.policy for tenant in tenants.values()})
        if policies and not self._parking.parkable.is_on:
            found = f"{_OFF} ({', '.join(policies[:5])})"
            self._failed_checks[NAME] = Check("idle tenants", False, found, _FIX)
        else:
            self._failed_checks.pop(NAME, None)

    # -- reports

    def view(self, tenant: Tenant) -> ParkingView | None:
        """Return the state of a tenant's parking.

        The result is None if the tenant was never parked and no policy parks the tenant.
        """
        view, cgroup, now = self._parking.view(tenant.cgroup), tenant.cgroup, time.monotonic()
        if not tenant.park.after_ns or not self._parking.parkable.is_on:
            return view
        view = view or ParkingView("running", None, "", 0, 0, 0.0, 0.0)
        after, refused = _after(tenant), self._refused.get(cgroup, "")
        if self._parking.is_away(cgroup) or cgroup in self._attempts:
            return replace(view, after_seconds=after, refused=refused)
        idle, left = self._idleness.seconds(now, cgroup), self._idleness.due_in(now, cgroup, after)
        return replace(view, after_seconds=after, idle_seconds=idle, parked_in_seconds=left, refused=refused)

    def explain(self, tenant: Tenant) -> str:
        """Return a text on whether and when a tenant is or can be parked. The result is empty if parking is off."""
        parkable, view = self._parking.parkable, self.view(tenant)
        if view and self._parking.is_away(tenant.cgroup):
            usage = self._ledger.usage(tenant.cgroup) or []
            return parking_text.sentence(plain(view), [{"parked_bytes": u.parked} for u in usage])
        if not parkable.is_on:
            return f"{_OFF}: {_FIX}" if tenant.park.after_ns else ""
        why = parkable.obstacle(tenant, parkable.processes_of(tenant))
        now = f"cannot be parked now: {why}" if why else "can be parked while no call is running"
        return "; ".join(filter(None, (now, parking_text.plan(plain(view)) if view else "")))


def _words(text: str) -> str:
    return re.sub(r"[0-9.]+", "", text)


def _after(tenant: Tenant) -> float:
    return tenant.park.after_ns / 1e9


def _devices(processes: Mapping[int, Process]) -> frozenset[int]:
    return frozenset(device for process in processes.values() for device in devices_of(process))
