"""Make room on a full device (`overcommit: park`) by parking idle tenants for other tenants.

Room is made for tenants that wake up, and for tenants with requests for memory (`room_requests.py`). This module runs
in the agent's main loop, at each attempt to wake a tenant or to decide about a request. Each attempt reads the free
memory of the device, reads the device's tenants if HOLDERS_SECONDS have passed, and begins to park at most one tenant.
The tenant for which room is being made has a claim, and wake-ups of other tenants do not use the claimed bytes
(`parked_tenant.coming_to`). Only one tenant of a device has a claim.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from fgpu_ebpf.agent import parker_client
from fgpu_ebpf.agent.idle_parking import IdleParking
from fgpu_ebpf.agent.parkable import by_tenant
from fgpu_ebpf.agent.parked_tenant import ParkedTenant, Phase, full_level, needs_of, outdated
from fgpu_ebpf.agent.parking import Parking
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.policy.rules import Priority
from fgpu_ebpf.tenancy.tenant import Tenant

MOST_NAMES = 5  # the most names of tenants in a text
HOLDERS_SECONDS = 0.5  # tenants that wait for the same devices share one reading of the holders in this time
_RANKS = list(Priority)  # from the highest to the lowest
_UNDECIDED = {
    Phase.CHECKING: "is about to be parked",
    Phase.PARKING: "is being parked",
    Phase.WAKING: "is being woken",  # all restored bytes are charged already, and some of them are no longer free
    Phase.UNKNOWN: "is in a state that the parker must report",
}
PARKS = (Phase.CHECKING, Phase.PARKING)  # room is being made while a tenant is in one of these phases
_ASKS = "waits for memory itself"
_TOO_SMALL = "can be parked, which is not enough"


@dataclass(frozen=True, slots=True)
class Holder:
    """A tenant with memory on a device that lacks room.

    `processes`: all processes of the tenant, with or without memory. `hindrance`: why the tenant must
    not be parked; empty if the tenant may be parked.
    """

    tenant: Tenant
    processes: Mapping[int, Process]
    hindrance: str
    idle_seconds: float

    def bytes_on(self, device: int) -> int:
        """Return the bytes that the tenant holds on a device."""
        return sum(process.bytes[device] for process in self.processes.values())

    @property
    def order(self) -> tuple[int, float]:
        """The key by which tenants are parked: lowest priority first, then longest idle time first."""
        priority = self.tenant.compute.priority if self.tenant.compute else Priority.NORMAL
        return -_RANKS.index(priority), -self.idle_seconds


class RoomMaker:
    """The steps that park idle tenants for tenants that wake up or request memory.

    Args:
        run_dir: the folder of the parker's socket.
        parking: the tenants that do not run.
        idle: the object that has the idle times of tenants and parks tenants.
    """

    def __init__(self, run_dir: Path, parking: Parking, idle: IdleParking) -> None:
        self._run_dir, self._parking, self._idle, self._parkable = run_dir, parking, idle, parking.parkable
        self._ledger, self._enforcer = parking.parkable.ledger, parking.parkable.enforcer
        self._seen: dict[frozenset[int], tuple[float, list[Holder]]] = {}  # by devices: time and holders
        self._asking: frozenset[int] = frozenset()

    def keep(self, asking: frozenset[int]) -> None:
        """Set the tenants with requests for memory, by cgroup. A tenant with a request is not parked."""
        self._asking = asking

    def make(self, waiting: ParkedTenant, needs: Mapping[int, int]) -> tuple[bool, str]:
        """Begin to make room for a tenant, if parking all tenants that can be parked would free enough memory.

        Args:
            waiting: the tenant, which cannot be woken now.
            needs: the bytes that have to be free, by device.

        Returns:
            Whether room is being made or may be made soon, and a text that names the cause of the wait.
        """
        lacking = self.lacking(needs)
        if not lacking:
            return False, ""
        if not outdated(waiting, self._parkable) and (full := full_level(waiting, self._ledger, self._enforcer)):
            return False, full
        if lacking.keys() & self._parkable.promised.keys():
            return False, "room is made for a request for memory first"
        if first := self.claimant(lacking, waiting):
            return False, f"room is made for {first} first"
        phase, why = self.park_one(waiting.name, lacking)
        return phase is not None, why

    def claimant(self, devices: Iterable[int], asker: ParkedTenant | None = None) -> str:
        """Return the name of another tenant that wakes up and has a claim on one of these devices, or an empty text."""
        claimants = (other for other in self._parking.tenants() if other is not asker and other.has_claim)
        return next((other.name for other in claimants if needs_of(other, self._ledger).keys() & {*devices}), "")

    def park_one(self, name: str, lacking: Mapping[int, int]) -> tuple[Phase | None, str]:
        """Begin to park a tenant of these devices, if parking all tenants that can be parked would free enough memory.

        Args:
            name: the tenant for which room is made.
            lacking: the bytes that have to become free, by device.

        Returns:
            The phase of the tenant to wait for, or None; and a text with the state of this tenant, or with the reason
            why no tenant is parked.
        """
        for other in self._parking.tenants():
            if other.is_undecided and self._holds(other, lacking):
                return other.phase, f"{other.name} {_UNDECIDED[other.phase]}"
        seen = self._holders(frozenset(lacking))
        holders = [replace(h, hindrance=_ASKS) if h.tenant.cgroup in self._asking else h for h in seen]
        ready = sorted((holder for holder in holders if not holder.hindrance), key=lambda holder: holder.order)
        is_enough = all(sum(h.bytes_on(device) for h in ready) >= bytes_ for device, bytes_ in lacking.items())
        if not is_enough or not ready:
            return None, _held_by(holders)
        if missing := parker_client.missing(self._run_dir):
            return None, missing
        self._seen.clear()
        if not self._park(ready[0], name):
            return None, _held_by(holders)
        return Phase.PARKING, f"{ready[0].tenant.name} {_UNDECIDED[Phase.PARKING]}"

    def lacking(self, needs: Mapping[int, int]) -> dict[int, int]:
        """Return by how many bytes the needs exceed the free bytes, by device.

        The result is empty if NVML does not report the free bytes.
        """
        nvml, lacking = self._parkable.nvml, dict[int, int]()
        for device, bytes_ in needs.items():
            free = nvml.free_bytes(device) if nvml else None
            if free is None:
                return {}
            if bytes_ > free:
                lacking[device] = bytes_ - free
        return lacking

    def _holds(self, parked: ParkedTenant, lacking: Iterable[int]) -> bool:
        """Return whether a tenant is charged on one of these devices."""
        processes = (self._ledger.process(pid) for pid, _ in parked.members)
        return any(process.bytes[device] for process in processes if process for device in lacking)

    def _holders(self, devices: frozenset[int]) -> list[Holder]:
        """Return the tenants that hold memory of these devices."""
        now = time.monotonic()
        self._seen = {of: seen for of, seen in self._seen.items() if now - seen[0] < HOLDERS_SECONDS}
        if devices not in self._seen:
            self._seen[devices] = now, list(self._look(now, devices))
        return self._seen[devices][1]

    def _look(self, now: float, devices: frozenset[int]) -> Iterator[Holder]:
        for cgroup, own in by_tenant(self._ledger).items():
            is_on = any(process.bytes[device] for process in own.values() for device in devices)
            if is_on and (tenant := self._enforcer.get(cgroup)):
                why = "is parked" if self._parking.is_away(cgroup) else self._idle.hindrance(now, tenant, own)
                yield Holder(tenant, own, why, self._idle.idle_seconds(now, tenant))

    def _park(self, holder: Holder, name: str) -> bool:
        purpose = f", to make room for {name}"
        return self._idle.begin(time.monotonic(), holder.tenant, holder.processes, purpose)


def _held_by(holders: list[Holder]) -> str:
    """Return a text with the tenants that hold the device, and why these tenants cannot be parked."""
    named = [f"{h.tenant.name} ({h.hindrance or _TOO_SMALL})" for h in islice(holders, MOST_NAMES)]
    more = [f"{len(holders) - MOST_NAMES} more"] if len(holders) > MOST_NAMES else []
    return f"held by {', '.join(named + more)}" if named else "no tenant holds memory of the device"
