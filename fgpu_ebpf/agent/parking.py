"""Parks tenants and wakes them up. docs/parking.md has the states, the order of all steps, and what a crash leaves.

Runs in the agent's main loop. The parker makes the driver's calls, which block; BPF programs change the charges. If it
is not known how far the parker has come, the driver is asked for the state of each process, and the charge is made to
agree with it.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Mapping, MutableMapping
from pathlib import Path

from fgpu_ebpf.agent import blocked_calls, parker_client
from fgpu_ebpf.agent.parkable import Parkable
from fgpu_ebpf.agent.parked_tenant import (
    Errand,
    Errands,
    Goal,
    MakeRoom,
    ParkedTenant,
    Phase,
    Totals,
    coming_to,
    full_level,
    needs_of,
    of_entries,
    outdated,
    report_stuck,
    view_of,
)
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver.start_checks import AgentError
from fgpu_ebpf.ledger.parked import Life
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.wakeup import Wakeup
from fgpu_ebpf.snapshot import ParkingView
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.tenant import Tenant

log = logging.getLogger("fgpu.parking")
AGAIN_SECONDS, MOST_DOUBLINGS = 1.0, 6  # between two attempts; doubled by each failure
CHECK_SECONDS = 30.0  # in which the stacks of a tenant can be read
MOST_TENANTS = 256  # parked at a time; each has a thread


class ParkingError(AgentError):
    """The tenant cannot be parked or woken. The text has the reason."""


class Parking:
    """All tenants that do not run.

    Args:
        run_dir: the folder of the parker's socket.
        parkable: decides which tenants can be parked.
        history: the event log.
        failed_checks: the agent's failed checks by name, which this class changes.
    """

    def __init__(
        self, run_dir: Path, parkable: Parkable, history: EventLog, failed_checks: MutableMapping[str, Check]
    ) -> None:
        self._run_dir, self.parkable, self._history, self._failed_checks = run_dir, parkable, history, failed_checks
        self._ledger, self._enforcer = parkable.ledger, parkable.enforcer
        self._tenants: dict[int, ParkedTenant] = {}
        self._selector: selectors.BaseSelector | None = None
        self._inbox: deque[Callable[[], None]] = deque()  # what threads have found, for the main loop
        self._wakeup = Wakeup()
        self._checks = blocked_calls.Checks()
        self.make_room: MakeRoom = lambda _, __: (False, "")
        self.errands = Errands()
        self.totals: dict[int, Totals] = {}

    # -- the agent's start and rounds

    def begin(self, selector: selectors.BaseSelector) -> None:
        """Take over the processes that an earlier agent was parking, or had parked, and begin to serve."""
        self._selector = selector
        selector.register(self._wakeup, selectors.EVENT_READ, self._take_inbox)
        self._tenants = of_entries(self._ledger, self._enforcer)
        self.look()

    def look(self) -> None:
        """Do what is due; to be called in every round."""
        now = time.monotonic()
        entries = self._ledger.parked.entries() if self._tenants else {}
        for parked in self.tenants():
            if parked.phase is Phase.CHECKING:
                if now > parked.since + CHECK_SECONDS:
                    self._give_up(parked, f"its memory could not be read within {CHECK_SECONDS:.0f} s")
                continue
            self._forget_ended(parked, entries)
            if parked.cgroup not in self._tenants:
                continue
            if parked.request and now > parked.request.until:
                self._lose_sight(parked, "the parker has not answered in time")
            if parked.request or now < parked.next_at:
                continue
            if parked.phase is Phase.UNKNOWN:
                self._ask_for_states(parked)
            elif parked.phase is Phase.WAITING:
                self._wake(parked)
            elif parked.phase is Phase.PARKED and (why := outdated(parked, self.parkable)):
                self._begin_to_wake(parked, why)
        self.totals = {cgroup: t for cgroup, t in self.totals.items() if self._enforcer.get(cgroup)}
        report_stuck(self._tenants.values(), self._failed_checks)

    def _forget_ended(self, parked: ParkedTenant, entries: Container[Life]) -> None:
        """Forget the processes that have ended or have executed another program: they have no entry any more."""
        for life, started in list(parked.members.items()):
            if life not in entries or procfs.started(life[0]) != started:
                del parked.members[life]
        if not parked.members:
            self._remove(parked, "all of its processes have ended")

    # -- requests

    def park(self, tenant: Tenant, reason: str = "") -> Errand:
        """Begin to park a tenant. `reason`: for the event. Raises ParkingError: it cannot be parked."""
        processes, known = self.parkable.processes_of(tenant), self._tenants.get(tenant.cgroup)
        why = f"it is {known.phase} already" if known else self.parkable.obstacle(tenant, processes)
        if not why and sum(parked.phase is not Phase.WAITING for parked in self._tenants.values()) >= MOST_TENANTS:
            why = f"{MOST_TENANTS} tenants are parked already"
        if why:
            raise ParkingError(f"{tenant.name} cannot be parked: {why}")
        members = {(pid, p.generation): procfs.started(pid) or 0 for pid, p in processes.items()}
        bytes_ = sum(sum(process.bytes) for process in processes.values())
        parked = ParkedTenant(tenant.cgroup, tenant.name, tenant.path, members, Phase.CHECKING, bytes_, reason=reason)
        errand = self.errands.add(Goal.PARK, tenant.name, bytes_)
        parked.errands.append(errand)
        self._tenants[tenant.cgroup] = parked
        if error := self._checks.begin(tenant.cgroup, lambda: self._check_calls(parked)):
            self._give_up(parked, error)
        return errand

    def _check_calls(self, parked: ParkedTenant) -> None:
        """Look at the calls of a tenant before it is parked. Runs in a thread of its own."""
        why, quiet = blocked_calls.before_parking(pid for pid, _ in parked.members)
        self._put(parked, lambda: self._begin_to_park(parked, why, quiet))

    def _begin_to_park(self, parked: ParkedTenant, why: str, quiet: blocked_calls.Places) -> None:
        if why or parked.shall_wake:
            self._give_up(parked, why or "it was woken meanwhile")
            return
        sock = parker_client.connected(self._run_dir)
        if sock is None:
            self._give_up(parked, f"the parker does not run: {parker_client.FIX}")
            return
        parked.quiet = quiet
        for life in parked.members:
            if error := self._ledger.parked.begin(life):
                sock.close()
                self._end_entries(parked.members)
                self._give_up(parked, f"{os.strerror(error)} (pid {life[0]})")
                return
        parked.enter(Phase.PARKING)
        self._ask(parked, sock, Goal.PARK)

    def _give_up(self, parked: ParkedTenant, why: str) -> None:
        """Cancel the parking of a tenant that has no entries in the ledger. The tenant continues to run."""
        parked.finish(Goal.WAKE)
        self._remove(parked, f"{parked.name} cannot be parked: {why}")

    def wake(self, cgroup: int, name: str) -> Errand:
        """Begin to wake a tenant. Raises ParkingError: it is not parked."""
        parked = self._tenants.get(cgroup)
        if parked is None:
            raise ParkingError(f"{name} is not parked")
        errand = self.errands.add(Goal.WAKE, name, parked.bytes)
        parked.errands.append(errand)
        self._begin_to_wake(parked, "by hand")
        return errand

    def _begin_to_wake(self, parked: ParkedTenant, reason: str = "") -> None:
        """Wake a tenant that shall be woken, if it is parked. Otherwise it is woken when it is."""
        parked.shall_wake = parked.shall_wake or reason
        if parked.phase is Phase.PARKED and parked.shall_wake:
            log.info("%s wakes up: %s", parked.name, parked.shall_wake)
            parked.failures = 0
            self._wake_later(parked, "")

    def _put(self, parked: ParkedTenant, then: Callable[[], None]) -> None:
        """Have the main loop call a function, unless the tenant is forgotten by then. Any thread may call this."""
        self._inbox.append(lambda: then() if self._tenants.get(parked.cgroup) is parked else None)
        self._wakeup.wake()

    def _take_inbox(self) -> None:
        self._wakeup.clear()
        while self._inbox:
            self._inbox.popleft()()

    # -- steps

    def _ask(self, parked: ParkedTenant, sock: socket.socket, op: Goal | None) -> None:
        """Send a request to the parker. If that fails, the driver is asked later. `op` None: ask for the states."""
        assert self._selector
        members = ((life[0], started) for life, started in parked.members.items())
        parked.op, parked.seconds = op or parked.op, 0.0
        parked.request = parker_client.ask(
            self._selector, sock, op or parker_client.STATE, members, parked.bytes,
            lambda line: self._take_line(parked, op, line),
            lambda: self._lose_sight(parked, "the parker has ended"),
        )  # fmt: skip
        if parked.request is None:
            self._lose_sight(parked, "the parker accepts no request")

    def _take_line(self, parked: ParkedTenant, op: Goal | None, line: parker_client.Line) -> None:
        seconds, states, result = line.get("seconds"), line.get("states"), line.get("result")
        if isinstance(seconds, int | float):
            parked.seconds += seconds
        if isinstance(states, dict):
            parked.close_request()
            self._settle(parked, {str(pid): str(state) for pid, state in states.items()})
        elif isinstance(result, str):
            parked.close_request()
            self._settle_result(parked, op, result, str(line.get("error") or ""))

    def _lose_sight(self, parked: ParkedTenant, why: str) -> None:
        """Record that it is not known how far the parker has come."""
        parked.close_request()
        parked.enter(Phase.UNKNOWN, why)
        parked.next_at = time.monotonic() + AGAIN_SECONDS

    def _settle_result(self, parked: ParkedTenant, op: Goal | None, result: str, error: str) -> None:
        """Act on a result. Only a success is believed: after a failure, also of a refused request, the driver knows."""
        if op and not error and (op, result) in ((Goal.PARK, "parked"), (Goal.WAKE, "running")):
            self.totals.setdefault(parked.cgroup, Totals()).count(op, parked.seconds)
            what, why = ("parked", parked.reason) if op is Goal.PARK else ("woken", parked.shall_wake)
            text = f"in {parked.seconds:.1f} s{why and f': {why}'}"
            self._history.add(what, tenant=parked.name, bytes=parked.bytes, text=text)
            (self._settle_parked if op is Goal.PARK else self._settle_running)(parked)
            return
        self._lose_sight(parked, error or f"the parker's result is {result!r}")
        if op:
            parked.failures += 1
            if op is Goal.WAKE or not parked.reason:  # else the error of the errand is reported
                self._history.add(f"{op} failed", tenant=parked.name, bytes=parked.bytes, text=parked.why)
            self._ask_for_states(parked)

    def _settle_parked(self, parked: ParkedTenant) -> None:
        """The device holds nothing: release the levels around the tenant."""
        self._release(parked.members)
        parked.finish(Goal.PARK)
        for waiting in self.tenants():
            if waiting.has_claim:  # it has waited for this, so it is woken before this tenant
                self._wake(waiting)
        if parked.shall_wake:
            self._wake_later(parked, parked.why)
            return
        parked.enter(Phase.PARKED)
        self._search_for_calls(parked)

    def _wake_later(self, parked: ParkedTenant, why: str) -> None:
        """Wake a tenant, at once unless attempts have failed."""
        parked.enter(Phase.WAITING, why)
        pause = AGAIN_SECONDS * 2 ** min(parked.failures, MOST_DOUBLINGS) if parked.failures else 0.0
        parked.next_at = time.monotonic() + pause
        if not pause:
            self._wake(parked)

    def _search_for_calls(self, parked: ParkedTenant) -> None:
        parked.calls = blocked_calls.BlockedCalls(
            lambda: self._pids_of(parked), parked.quiet, self.parkable.root / parked.path.strip("/"),
            lambda pid: self._put(parked, lambda: self._begin_to_wake(parked, f"a call of pid {pid}")),
        )  # fmt: skip
        try:
            parked.calls.start()
        except RuntimeError as no_thread:
            parked.calls = None
            self._begin_to_wake(parked, str(no_thread))

    def _pids_of(self, parked: ParkedTenant) -> set[int]:
        """Return all processes of a tenant, also those that are not parked. Any thread may call this."""
        own = {pid for pid, process in self._ledger.processes().items() if process.levels[:1] == (parked.cgroup,)}
        return own | {pid for pid, _ in list(parked.members)}

    def _settle_running(self, parked: ParkedTenant) -> None:
        """The tenant runs: what the device holds is charged."""
        for life in parked.members:
            self._ledger.parked.wake(life, force=True)
        self._end_entries(parked.members)
        parked.finish(Goal.WAKE)
        self._remove(parked, parked.why or "interrupted")

    def _settle_lost(self, parked: ParkedTenant, lives: Collection[Life]) -> None:
        """The driver cannot restore these processes. Their calls get its errors, and NVML shows what they hold."""
        pids = ", ".join(str(pid) for pid, _ in lives)
        self._history.add("parking lost", tenant=parked.name, text=f"the driver reports a failure of pid {pids}")
        for goal in Goal:
            parked.finish(goal, f"the driver has lost pid {pids}")
        for life in lives:
            self._ledger.parked.wake(life, force=True)
            parked.members.pop(life)
        self._end_entries(lives)
        parked.shall_wake = parked.shall_wake or "the driver has lost another process of it"

    def _release(self, lives: Iterable[Life]) -> None:
        for life in lives:
            self._ledger.parked.park(life)

    def _end_entries(self, lives: Iterable[Life]) -> None:
        for life in lives:
            if error := self._ledger.parked.end(life):
                log.debug("no entry of pid %d to end: %s", life[0], os.strerror(error))

    def _wake(self, parked: ParkedTenant) -> None:
        """Charge the tenant, and have it restored; if there is no room, try again later."""
        needs, coming = needs_of(parked, self._ledger), coming_to(parked, self._tenants.values(), self.parkable)
        needs.update({device: coming[device] for device in needs})
        if why := self.parkable.full_device(needs):
            has_claim, blockers = self.make_room(parked, needs)
            self._wait(parked, "; ".join(filter(None, (why, blockers))), has_claim)
            return
        sock = parker_client.connected(self._run_dir)
        if sock is None:
            self._wait(parked, f"the parker does not run: {parker_client.FIX}")
            return
        force = bool(outdated(parked, self.parkable))  # a level that it is about to leave does not keep it
        if any(self._ledger.parked.wake(life, force) == errno.ENOSPC for life in parked.members):
            sock.close()
            self._release(parked.members)
            self._wait(parked, full_level(parked, self._ledger, self._enforcer) or "a group around it has no room")
            return
        parked.enter(Phase.WAKING)
        self._ask(parked, sock, Goal.WAKE)

    def _wait(self, parked: ParkedTenant, why: str, has_claim: bool = False) -> None:
        if not parked.why:  # later reasons have other numbers
            self._history.add("wake waits", tenant=parked.name, bytes=parked.bytes, text=why)
        parked.enter(Phase.WAITING, why)
        parked.has_claim, parked.next_at = has_claim, time.monotonic() + AGAIN_SECONDS

    # -- the driver's states

    def _ask_for_states(self, parked: ParkedTenant) -> None:
        sock = parker_client.connected(self._run_dir)
        if sock is None:
            parked.next_at = time.monotonic() + AGAIN_SECONDS
            parked.why = f"the parker does not run: {parker_client.FIX}"
            return
        parked.next_at = time.monotonic() + AGAIN_SECONDS
        self._ask(parked, sock, None)

    def _settle(self, parked: ParkedTenant, states: Mapping[str, str]) -> None:
        """Make the ledger agree with the driver. Processes in different states, or locked ones, are woken together."""
        if lost := [life for life in parked.members if states.get(str(life[0])) == "failed"]:
            self._settle_lost(parked, lost)
        said = {states.get(str(pid), "unknown") for pid, _ in parked.members} - {"gone"}
        # All are parked or none. So if one runs, a process that the driver does not know is none that it has parked.
        if said <= {"running"} or said == {"running", "unknown"}:
            self._settle_running(parked)
        elif said == {"checkpointed"}:
            self._settle_parked(parked)
        elif "unknown" in said:
            self._lose_sight(parked, "the driver does not report the state of all processes")
        else:
            self._release([life for life in parked.members if states.get(str(life[0])) == "checkpointed"])
            parked.shall_wake = parked.shall_wake or f"interrupted: {parked.why}"
            self._wake_later(parked, parked.why)

    # -- what others see

    def _remove(self, parked: ParkedTenant, error: str) -> None:
        """Forget a tenant that runs or has ended. `error`: for requests that are not finished."""
        parked.close_request()
        parked.enter(Phase.UNKNOWN)
        self._tenants.pop(parked.cgroup, None)
        self._enforcer.moves.catch_up(pid for pid, _ in parked.members)
        self._enforcer.release_left()
        for goal in Goal:
            parked.finish(goal, error)

    def stop(self) -> None:
        """End all threads and connections. The next agent takes over."""
        for parked in self._tenants.values():
            parked.close_request()
            parked.enter(Phase.UNKNOWN)

    def tenants(self) -> list[ParkedTenant]:
        """Return the tenants that do not run or are about to be parked, those that have waited longest first."""
        return sorted(self._tenants.values(), key=lambda parked: parked.since)

    def names(self) -> list[str]:
        """Return the names of the tenants that do not run."""
        return sorted(parked.name for parked in self._tenants.values())

    def is_away(self, cgroup: int) -> bool:
        """Return whether a tenant does not run, or is about to be parked."""
        return cgroup in self._tenants

    def view(self, cgroup: int) -> ParkingView | None:
        """Return what is known of a tenant's parking; None: it was never parked since the agent's start."""
        return view_of(self._tenants.get(cgroup), self.totals.get(cgroup))
