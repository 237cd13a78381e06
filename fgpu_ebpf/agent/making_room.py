"""Makes room on a full device (`overcommit: park`): idle tenants of it are parked for others.

The others are tenants that wake up, and tenants with requests for memory (`room_requests.py`). Runs in the agent's main
loop, at each attempt to wake such a tenant or to decide about such a request. Each attempt looks at the device anew,
and at its tenants if HOLDERS_SECONDS have passed, and begins one park at most. The tenant for which room is being made
has a claim, which the wake-ups of others leave free (`parked_tenant.coming_to`). Only one tenant of a device has one.
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

MOST_NAMES = 5  # in a text
HOLDERS_SECONDS = 0.5  # many tenants that wait look at the holders of their devices together
_RANKS = list(Priority)  # the highest first
_UNDECIDED = {
    Phase.CHECKING: "is about to be parked",
    Phase.PARKING: "is being parked",
    Phase.WAKING: "is being woken",  # what it gets back is charged, and a part of that is no longer free
    Phase.UNKNOWN: "is in a state that the parker has to find out",
}
PARKS = (Phase.CHECKING, Phase.PARKING)  # room is being made, if a tenant is in one of these
MOVES = (*PARKS, Phase.WAKING)  # it will be known soon what is missing
_ASKS = "waits for memory itself"
_TOO_SMALL = "can be parked, which is not enough"


@dataclass(frozen=True, slots=True)
class Holder:
    """A tenant with memory on a device that lacks room. `processes`: all of it, also those without memory.

    `hindrance`: why it must not be parked; empty: it may be.
    """

    tenant: Tenant
    processes: Mapping[int, Process]
    hindrance: str
    idle_seconds: float

    def bytes_on(self, device: int) -> int:
        """Return what the tenant holds on a device."""
        return sum(process.bytes[device] for process in self.processes.values())

    @property
    def order(self) -> tuple[int, float]:
        """The key by which holders are parked: the lowest priority first, then the longest idle."""
        priority = self.tenant.compute.priority if self.tenant.compute else Priority.NORMAL
        return -_RANKS.index(priority), -self.idle_seconds


class RoomMaker:
    """Parks idle tenants for those that wake up or request memory.

    Args:
        run_dir: the folder of the parker's socket.
        parking: has the tenants that do not run.
        idle: knows how long tenants have been idle, and parks them.
    """

    def __init__(self, run_dir: Path, parking: Parking, idle: IdleParking) -> None:
        self._run_dir, self._parking, self._idle, self._parkable = run_dir, parking, idle, parking.parkable
        self._ledger, self._enforcer = parking.parkable.ledger, parking.parkable.enforcer
        self._seen: dict[frozenset[int], tuple[float, list[Holder]]] = {}  # by devices: when, and their holders
        self._asking: frozenset[int] = frozenset()

    def keep(self, asking: frozenset[int]) -> None:
        """Set the tenants with requests for memory, by cgroup. These are not parked."""
        self._asking = asking

    def make(self, waiting: ParkedTenant, needs: Mapping[int, int]) -> tuple[bool, str]:
        """Begin to make room for a tenant, if all that can be parked would be enough.

        Args:
            waiting: the tenant, which cannot be woken now.
            needs: the bytes by device that have to be free.

        Returns:
            Whether room is being made, and for what the tenant waits, as text.
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
        return phase in MOVES, why

    def claimant(self, devices: Iterable[int], asker: ParkedTenant | None = None) -> str:
        """Return the other tenant that wakes up and has a claim on one of these devices; an empty text: none."""
        claimants = (other for other in self._parking.tenants() if other is not asker and other.has_claim)
        return next((other.name for other in claimants if needs_of(other, self._ledger).keys() & {*devices}), "")

    def park_one(self, name: str, lacking: Mapping[int, int]) -> tuple[Phase | None, str]:
        """Begin to park a tenant of these devices, if all that can be parked would be enough.

        Args:
            name: the tenant for which room is made.
            lacking: the bytes by device that have to become free.

        Returns:
            The phase of the tenant that is waited for, or None; and its state, or why none is parked, as text.
        """
        for other in self._parking.tenants():
            if other.phase in _UNDECIDED and self._holds(other, lacking):
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
        """Return by how many bytes the needs exceed what is free, by device; nothing if NVML does not report that."""
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
    """Return which tenants hold the device and why these cannot be parked, as text."""
    named = [f"{h.tenant.name} ({h.hindrance or _TOO_SMALL})" for h in islice(holders, MOST_NAMES)]
    more = [f"{len(holders) - MOST_NAMES} more"] if len(holders) > MOST_NAMES else []
    return f"held by {', '.join(named + more)}" if named else "no tenant holds it"
