"""The state of a tenant that is parked or is being parked or woken, and users' requests that wait for the result.

This module contains only data, and runs in the agent's main loop, which has one ParkedTenant for each of these tenants.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

from fgpu_ebpf.agent import blocked_calls, parker_client
from fgpu_ebpf.agent.parkable import Parkable
from fgpu_ebpf.check import Check
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.parked import Life, Parked
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.policy.units import memory_text
from fgpu_ebpf.snapshot import ParkingView
from fgpu_ebpf.tenancy.enforcer import Enforcer

MOST_ERRANDS = 128
MOST_DOUBLINGS = 6  # of the pause between two attempts
LOST_SECONDS = 10.0  # other tenants wait no longer than this for a tenant in an unknown state


class Phase(StrEnum):
    """The phases of a tenant that does not run, from the check of its calls to the wake-up."""

    CHECKING = "checking"  # the calls are being checked; the ledger has no entry of the tenant yet
    PARKING = "parking"
    PARKED = "parked"
    WAITING = "waiting"  # parked, and to be woken as soon as possible
    WAKING = "waking"
    UNKNOWN = "unknown"  # the driver must be queried


class Goal(StrEnum):
    """The result that a user requests: a parked tenant or a running tenant."""

    PARK = "park"
    WAKE = "wake"


@dataclass(slots=True, eq=False)
class Errand:
    """A request of a user to park or to wake a tenant.

    `seconds`: the time of the driver's copy. `waits`: the cause of the wait; empty for a wait for the driver.
    """

    number: int
    goal: Goal
    tenant: str
    bytes: int
    is_done: bool = False
    seconds: float = 0.0
    error: str = ""
    waits: str = ""

    def finish(self, seconds: float, error: str = "") -> None:
        """Record the result. `error`: empty if the request succeeded."""
        self.is_done, self.seconds, self.error, self.waits = True, seconds, error, ""

    def view(self) -> dict[str, object]:
        """Return the state of the request for the command that waits for the result."""
        return {
            "errand": self.number, "goal": self.goal, "tenant": self.tenant, "bytes": self.bytes,
            "done": self.is_done, "seconds": self.seconds, "error": self.error, "waits": self.waits,
        }  # fmt: skip


class Errands:
    """The last MOST_ERRANDS requests of users to park or wake a tenant, by number."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._errands: dict[int, Errand] = {}

    def add(self, goal: Goal, tenant: str, bytes_: int) -> Errand:
        """Add a request, and remove the oldest request if there are more than MOST_ERRANDS."""
        errand = Errand(next(self._numbers), goal, tenant, bytes_)
        self._errands[errand.number] = errand
        if len(self._errands) > MOST_ERRANDS:
            del self._errands[next(iter(self._errands))]
        return errand

    def get(self, number: int) -> Errand | None:
        """Return the request with a number, or None if the request was removed or never existed."""
        return self._errands.get(number)


@dataclass(slots=True)
class Totals:
    """Counts of a tenant since the agent's start: the numbers of parks and wake-ups, and the time of the copies."""

    parks: int = 0
    wakes: int = 0
    park_seconds: float = 0.0
    wake_seconds: float = 0.0

    def count(self, goal: Goal, seconds: float) -> None:
        """Count that the tenant was parked or woken."""
        if goal is Goal.PARK:
            self.parks, self.park_seconds = self.parks + 1, self.park_seconds + seconds
        else:
            self.wakes, self.wake_seconds = self.wakes + 1, self.wake_seconds + seconds


@dataclass(slots=True, eq=False)
class ParkedTenant:
    """The state of a tenant that does not run.

    `members`: the start time of each process of the tenant that is or will be parked, in clock ticks since boot.
    `quiet`: the places at which threads slept before the parking. `calls`: the search for calls while the tenant is
    parked. `why`: why the tenant waits, or why the driver must be queried. `next_at`: the time of the next attempt, on
    the monotonic clock. `op`: the last request that changes the driver's state; None if an earlier agent sent the
    request. `failures`: the number of failed requests to the parker. `seconds`: the time of the driver's copy.
    `shall_wake`: why the tenant is to be woken after the parking; empty if the tenant is to stay parked. `reason`: why
    the tenant was parked; empty for a request of a user. `has_claim`: the tenant waits while room is being made. No
    other tenant may use this room to wake up. `away`: the processes with memory in the host when the last attempt
    to wake the tenant began.
    """

    cgroup: int
    name: str
    path: str
    members: dict[Life, int]
    phase: Phase
    bytes: int = 0
    quiet: blocked_calls.Places = field(default_factory=dict)
    why: str = ""
    since: float = field(default_factory=time.monotonic)
    op: Goal | None = None
    request: parker_client.Request | None = None
    calls: blocked_calls.BlockedCalls | None = None
    errands: list[Errand] = field(default_factory=list)
    next_at: float = 0.0
    failures: int = 0
    seconds: float = 0.0
    shall_wake: str = ""
    reason: str = ""
    has_claim: bool = False
    away: list[Life] = field(default_factory=list)

    @property
    def is_undecided(self) -> bool:
        """True if it will be known soon how many bytes the tenant holds on a device."""
        if self.phase is Phase.UNKNOWN:
            return time.monotonic() <= self.since + LOST_SECONDS
        return self.phase in (Phase.CHECKING, Phase.PARKING, Phase.WAKING)

    def enter(self, phase: Phase, why: str = "") -> None:
        """Change the phase. Unless the new phase is PARKED, stop the search for calls."""
        if phase is not Phase.PARKED and self.calls:
            self.calls.stop()
            self.calls = None
        if phase is not self.phase:
            self.since = time.monotonic()
        self.has_claim = self.has_claim and phase is Phase.WAITING
        self.phase, self.why = phase, why
        for errand in self.errands:
            errand.waits = why

    def keep_away(self, entries: Mapping[Life, Parked]) -> None:
        """Set `away` from the ledger's entries, before the ledger is charged for the wake-up."""
        self.away = [life for life in self.members if life in entries and any(entries[life].bytes)]

    def pause(self, seconds: float) -> float:
        """Return the pause before the next attempt: these seconds, doubled after each failure."""
        return float(seconds * 2 ** min(self.failures, MOST_DOUBLINGS))

    def close_request(self) -> None:
        """Stop waiting for the parker's answer."""
        if self.request:
            self.request.close()
            self.request = None

    def finish(self, goal: Goal, error: str = "") -> None:
        """Finish all requests of users with this goal."""
        for errand in self.errands:
            if errand.goal is goal:
                errand.finish(self.seconds, error)
        self.errands = [errand for errand in self.errands if not errand.is_done]


# A function that is called with the bytes that have to be free, by device, if the devices lack room for a tenant that
# wakes up. The result is whether room is being made, and a text with the cause of the wait.
MakeRoom = Callable[[ParkedTenant, Mapping[int, int]], tuple[bool, str]]


def of_entries(ledger: Ledger, enforcer: Enforcer) -> dict[int, ParkedTenant]:
    """Return the tenants that an earlier agent was parking or had parked, by cgroup. The driver must be queried."""
    found: dict[int, ParkedTenant] = {}
    for life, entry in ledger.parked.entries().items():
        process = ledger.process(life[0])
        process = process if process and process.generation == life[1] else None
        cgroup = entry.level or (process.levels[0] if process and process.levels else 0)
        if cgroup not in found:
            tenant = enforcer.get(cgroup)
            path = tenant.path if tenant else procfs.cgroup_path(life[0]) or "/"
            why = "the agent has started"
            name = enforcer.name_of(cgroup) or path
            found[cgroup] = ParkedTenant(cgroup, name, path, {}, Phase.UNKNOWN, why=why)
        found[cgroup].members[life] = procfs.started(life[0]) or 0
        found[cgroup].bytes += sum(entry.bytes) + (sum(process.bytes) if process else 0)
    return found


def needs_of(parked: ParkedTenant, ledger: Ledger) -> Counter[int]:
    """Return the parked bytes of a tenant by device. Devices without parked bytes are left out."""
    entries = ledger.parked.entries()
    return _by_device(entries[life].bytes for life in parked.members if life in entries)


def coming_to(asker: ParkedTenant | None, tenants: Collection[ParkedTenant], parkable: Parkable) -> Counter[int]:
    """Return the bytes by device that other tenants may take: charged bytes, and bytes for which room is made.

    A tenant that is being parked uses its bytes again if the parking fails. `asker` is None for a request for memory.
    """
    ledger = parkable.ledger
    others = [parked for parked in tenants if parked is not asker]
    away = (parked for parked in others if parked.phase in (Phase.PARKING, Phase.WAKING, Phase.UNKNOWN))
    processes = (ledger.process(pid) for parked in away for pid, _ in parked.members)
    claims = (needs_of(parked, ledger) for parked in others if parked.has_claim)
    promised = parkable.promised if asker else Counter()
    return sum(claims, promised + _by_device(process.bytes for process in processes if process))


def _by_device(rows: Iterable[Sequence[int]]) -> Counter[int]:
    return Counter({device: bytes_ for device, bytes_ in enumerate(map(sum, zip(*rows, strict=True))) if bytes_})


def view_of(parked: ParkedTenant | None, totals: Totals | None) -> ParkingView | None:
    """Return the parking of a tenant for a Snapshot, or None if the tenant was not parked since the agent's start."""
    if parked is None and totals is None:
        return None
    t = totals or Totals()
    state, seconds, why = "running", None, ""
    if parked:
        state, seconds, why = parked.phase.value, time.monotonic() - parked.since, parked.why
    return ParkingView(state, seconds, why, t.parks, t.wakes, t.park_seconds, t.wake_seconds)


def report_stuck(tenants: Iterable[ParkedTenant], failed_checks: MutableMapping[str, Check]) -> None:
    """Report the tenants that may have to wait for a long time, and the reasons, as a failed check."""
    slow = (p for p in tenants if p.phase in (Phase.UNKNOWN, Phase.WAITING))
    if found := "; ".join(f"{parked.name} is {parked.phase}: {parked.why}" for parked in islice(slow, 5)):
        failed_checks["parking"] = Check("parking", False, found, "`fgpu explain TENANT` names the reason")
    else:
        failed_checks.pop("parking", None)


def outdated(tenant: ParkedTenant, parkable: Parkable) -> str:
    """Return why a tenant must not stay parked, or an empty text if the tenant may stay parked.

    The levels of a parked process cannot change, so the tenant is woken before a change.
    """
    ledger, enforcer = parkable.ledger, parkable.enforcer
    if not parkable.is_on:
        return "parking is off"
    if ledger.parked.unmoved.intersection(pid for pid, _ in tenant.members):
        return "the limits around a process have changed"
    leaving = enforcer.leaving.keys()
    processes = [ledger.process(pid) for pid, _ in tenant.members] if leaving else []
    is_left = any(leaving & process.levels for process in processes if process)
    return "a limit was removed" if is_left or not enforcer.get(tenant.cgroup) else ""


def changed(parked: ParkedTenant, parkable: Parkable) -> str:
    """Set the bytes of a tenant after the check of its calls. Return why the tenant can no longer be parked, or "".

    The tenant may have run, allocated memory or moved during the check.
    """
    tenant = parkable.enforcer.get(parked.cgroup)
    processes = parkable.processes_of(tenant) if tenant else {}
    if tenant is None or {(pid, process.generation) for pid, process in processes.items()} != parked.members.keys():
        return "the tenant's processes or limits have changed meanwhile"
    if why := parkable.obstacle(tenant, processes):
        return why
    parked.bytes = sum(sum(process.bytes) for process in processes.values())
    for errand in parked.errands:
        errand.bytes = parked.bytes
    return ""


def full_level(tenant: ParkedTenant, ledger: Ledger, enforcer: Enforcer) -> str:
    """Return a text about a level around a parked tenant that has no room for the tenant, or an empty text.

    Levels with `mode: observe` are never full.
    """
    entries, needs = ledger.parked.entries(), dict[int, Counter[int]]()  # by level
    for life in tenant.members:
        process, entry = ledger.process(life[0]), entries.get(life)
        for level in process.levels[1:] if process and entry else ():
            needs.setdefault(level, Counter()).update(_by_device([entry.bytes]) if entry else {})
    for level, needed in needs.items():
        group = enforcer.get(level)
        for device, u in enumerate(() if group and group.observe else ledger.usage(level) or ()):
            if needed[device] and u.used + needed[device] > u.limit:
                used = f"{memory_text(u.used)} of {memory_text(u.limit)} in use on gpu {device}"
                return f"group {enforcer.name_of(level)} has {used}"
    return ""
