"""Parking and waking of tenants. docs/parking.md has the states, the order of steps, and the state after a crash.

This module runs in the agent's main loop. The parker makes the driver's calls, which block, and BPF programs change the
charges. If the parker's progress is unknown, the driver is queried for the state of each process, and the charge is
corrected accordingly.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from pathlib import Path

from fgpu_ebpf.agent import blocked_calls, parked_tenant, parker_client
from fgpu_ebpf.agent.parkable import Parkable
from fgpu_ebpf.agent.parked_tenant import Errand, Errands, Goal, MakeRoom, ParkedTenant, Phase, Totals
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver.start_checks import AgentError
from fgpu_ebpf.ledger.parked import Life
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.wakeup import Wakeup
from fgpu_ebpf.snapshot import ParkingView
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.tenant import Tenant

log = logging.getLogger("fgpu.parking")
AGAIN_SECONDS = 1.0  # between two attempts; each failure doubles the time
CHECK_SECONDS = 30.0  # the longest time to read the stacks of a tenant
MOST_TENANTS = 256  # parked at the same time; each tenant has a thread


class ParkingError(AgentError):
    """The error of a tenant that cannot be parked or woken. The text has the reason."""


class Parking:
    """The tenants that do not run.

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
        self._inbox: deque[Callable[[], None]] = deque()  # functions from threads, for the main loop
        self._wakeup = Wakeup()
        self._checks = blocked_calls.Checks()
        self.make_room: MakeRoom = lambda _, __: (False, "")
        self.errands = Errands()
        self.totals: dict[int, Totals] = {}

    # -- the agent's start and rounds

    def begin(self, selector: selectors.BaseSelector) -> None:
        """Take over the processes that an earlier agent was parking or had parked, and begin to serve."""
        self._selector = selector
        selector.register(self._wakeup, selectors.EVENT_READ, self._take_inbox)
        self._tenants = parked_tenant.of_entries(self._ledger, self._enforcer)
        self.look()

    def look(self) -> None:
        """Do the steps that are due. The agent calls this method in every round."""
        now = time.monotonic()
        entries = self._ledger.parked.entries() if self._tenants else {}
        for parked in self.tenants():
            if parked.phase is Phase.CHECKING:
                if now > parked.since + CHECK_SECONDS:
                    self._give_up(parked, f"the tenant's memory could not be read within {CHECK_SECONDS:.0f} s")
                continue
            self._forget_ended(parked, entries)
            if parked.cgroup not in self._tenants:
                continue
            if parked.request and now > parked.request.until:
                self._lose_sight(parked, "the parker has not answered before the timeout")
            if parked.request or now < parked.next_at:
                continue
            if parked.phase is Phase.WAITING:
                self._wake(parked)
            elif parked.phase is not Phase.PARKED:  # UNKNOWN, or an error has interrupted the step after an answer
                self._ask_for_states(parked)
            elif why := parked_tenant.outdated(parked, self.parkable):
                self._begin_to_wake(parked, why)
        self.totals = {cgroup: t for cgroup, t in self.totals.items() if self._enforcer.get(cgroup)}
        parked_tenant.report_stuck(self._tenants.values(), self._failed_checks)

    def _forget_ended(self, parked: ParkedTenant, entries: Mapping[Life, object]) -> None:
        """Remove the processes without an entry: they have ended, or have executed another program."""
        for life in parked.members.keys() - entries:
            del parked.members[life]
        if not parked.members:
            self._remove(parked, "all processes of the tenant have ended")

    # -- requests

    def park(self, tenant: Tenant, reason: str = "") -> Errand:
        """Begin to park a tenant. `reason`: the event's text. Raise ParkingError if the tenant cannot be parked."""
        processes, known = self.parkable.processes_of(tenant), self._tenants.get(tenant.cgroup)
        why = f"the tenant is {known.phase} already" if known else self.parkable.obstacle(tenant, processes)
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
        """Check the calls of a tenant before the tenant is parked. This function runs in its own thread."""
        why, quiet = blocked_calls.before_parking(pid for pid, _ in parked.members)
        self._put(parked, lambda: self._begin_to_park(parked, why, quiet))

    def _begin_to_park(self, parked: ParkedTenant, why: str, quiet: blocked_calls.Places) -> None:
        why = why or (parked.shall_wake and "the tenant was woken meanwhile")
        if why := why or parked_tenant.changed(parked, self.parkable):
            self._give_up(parked, why)
            return
        sock = parker_client.connected(self._run_dir)
        if sock is None:
            self._give_up(parked, f"the parker does not run: {parker_client.fix()}")
            return
        parked.quiet = quiet
        parked.enter(Phase.PARKING)
        for life in parked.members:
            if error := self._ledger.parked.begin(life):
                sock.close()
                self._end_entries(parked.members)
                self._give_up(parked, f"{os.strerror(error)} (pid {life[0]})")
                return
        self._ask(parked, sock, Goal.PARK)

    def _give_up(self, parked: ParkedTenant, why: str) -> None:
        """Cancel the parking of a tenant without entries in the ledger. The tenant continues to run."""
        parked.finish(Goal.WAKE)
        self._remove(parked, f"{parked.name} cannot be parked: {why}")

    def wake(self, cgroup: int, name: str) -> Errand:
        """Begin to wake a tenant. Raise ParkingError if the tenant is not parked."""
        parked = self._tenants.get(cgroup)
        if parked is None:
            raise ParkingError(f"{name} is not parked")
        errand = self.errands.add(Goal.WAKE, name, parked.bytes)
        parked.errands.append(errand)
        self._begin_to_wake(parked, "by hand")
        return errand

    def _begin_to_wake(self, parked: ParkedTenant, reason: str = "") -> None:
        """Wake a tenant that is parked, or record that a tenant that is being parked is to be woken afterwards."""
        parked.shall_wake = parked.shall_wake or reason
        if parked.phase is Phase.PARKED and parked.shall_wake:
            log.info("%s wakes up: %s", parked.name, parked.shall_wake)
            parked.failures = 0
            self._wake_later(parked)

    def _put(self, parked: ParkedTenant, then: Callable[[], None]) -> None:
        """Make the main loop call a function unless the tenant was removed. Any thread may call this method."""
        self._inbox.append(lambda: then() if self._tenants.get(parked.cgroup) is parked else None)
        self._wakeup.wake()

    def _take_inbox(self) -> None:
        self._wakeup.clear()
        try:
            while self._inbox:
                self._inbox.popleft()()
        finally:
            if self._inbox:  # an error of one function must not delay the others
                self._wakeup.wake()

    # -- steps

    def _ask(self, parked: ParkedTenant, sock: socket.socket, op: Goal | None) -> None:
        """Send the request `op`, or None for the states, to the parker. After a failure, query the driver later."""
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
        seconds, states = line.get("seconds"), line.get("states")
        if isinstance(seconds, int | float):
            parked.seconds += seconds
        if isinstance(states, dict):
            parked.close_request()
            self._settle(parked, {str(pid): str(state) for pid, state in states.items()})
        elif isinstance(line.get("result"), str):
            parked.close_request()
            self._settle_result(parked, op, line)

    def _lose_sight(self, parked: ParkedTenant, why: str) -> None:
        """Record that the parker's progress is unknown."""
        parked.close_request()
        parked.enter(Phase.UNKNOWN, why)
        parked.next_at = time.monotonic() + parked.pause(AGAIN_SECONDS)

    def _settle_result(self, parked: ParkedTenant, op: Goal | None, line: parker_client.Line) -> None:
        """Process the parker's result. Query the driver after a failure, unless the parker has made no call."""
        result, error = line["result"], str(line.get("error") or "")
        if op and not error and (op, result) in ((Goal.PARK, "parked"), (Goal.WAKE, "running")):
            self.totals.setdefault(parked.cgroup, Totals()).count(op, parked.seconds)
            what, why = ("parked", parked.reason) if op is Goal.PARK else ("woken", parked.shall_wake)
            text = f"in {parked.seconds:.1f} s{why and f': {why}'}"
            self._history.add(what, tenant=parked.name, bytes=parked.bytes, text=text)
            (self._settle_parked if op is Goal.PARK else self._settle_running)(parked)
            return
        parked.failures += bool(op or line.get("changed") is False)  # a running job refuses a request for the state
        self._lose_sight(parked, error or f"the parker's result is {result!r}")
        if op:
            if op is Goal.WAKE or not parked.reason:  # in the other case the errand's error is reported
                self._history.add(f"{op} failed", tenant=parked.name, bytes=parked.bytes, text=parked.why)
            if line.get("changed") is False:
                self._release(parked.away)
                (self._settle_running if op is Goal.PARK else self._wake_later)(parked)
            else:
                self._ask_for_states(parked)

    def _settle_parked(self, parked: ParkedTenant) -> None:
        """Release the charges of the levels around a tenant, because the device no longer holds the tenant's memory."""
        self._release(parked.members)
        parked.finish(Goal.PARK)
        for waiting in filter(lambda one: one.has_claim, self.tenants()):  # the room was made for this tenant
            self._wake(waiting)
        if parked.shall_wake:
            self._wake_later(parked)
            return
        parked.enter(Phase.PARKED)
        self._search_for_calls(parked)

    def _wake_later(self, parked: ParkedTenant) -> None:
        """Wake a tenant, immediately if no attempt has failed, or after a pause."""
        parked.enter(Phase.WAITING, parked.why)
        pause = parked.pause(AGAIN_SECONDS) if parked.failures else 0.0
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
        """Return all processes of a tenant, parked or not. Any thread may call this method."""
        own = {pid for pid, process in self._ledger.processes().items() if process.levels[:1] == (parked.cgroup,)}
        return own | {pid for pid, _ in list(parked.members)}

    def _settle_running(self, parked: ParkedTenant) -> None:
        """Charge the bytes that the device holds for a tenant that runs again."""
        self._end_entries(parked.members)
        parked.finish(Goal.WAKE)
        self._remove(parked, parked.why or "interrupted")

    def _settle_lost(self, parked: ParkedTenant, lives: Collection[Life]) -> None:
        """Remove processes that the driver cannot restore, and whose calls therefore get errors of the driver."""
        pids = ", ".join(str(pid) for pid, _ in lives)
        self._history.add("parking lost", tenant=parked.name, text=f"the driver reports a failure of pid {pids}")
        for goal in Goal:
            parked.finish(goal, f"the driver has lost pid {pids}")
        for life in lives:
            parked.members.pop(life)
        self._end_entries(lives)
        parked.shall_wake = parked.shall_wake or "the driver has lost another process of the tenant"

    def _release(self, lives: Iterable[Life]) -> None:
        for life in lives:
            self._ledger.parked.park(life)

    def _end_entries(self, lives: Iterable[Life]) -> None:
        for life in lives:
            self._ledger.parked.wake(life, force=True)
            if error := self._ledger.parked.end(life):
                log.debug("the entry of pid %d cannot be removed: %s", life[0], os.strerror(error))

    def _wake(self, parked: ParkedTenant) -> None:
        """Charge the tenant, and request the restoration of the memory. If there is no room, try again later."""
        needs = parked_tenant.needs_of(parked, self._ledger)
        coming = parked_tenant.coming_to(parked, self._tenants.values(), self.parkable)
        needs.update({device: coming[device] for device in needs})
        if why := self.parkable.full_device(needs):
            has_claim, blockers = self.make_room(parked, needs)
            self._wait(parked, "; ".join(filter(None, (why, blockers))), has_claim)
            return
        sock = parker_client.connected(self._run_dir)
        if sock is None:
            self._wait(parked, f"the parker does not run: {parker_client.fix()}")
            return
        parked.keep_away(self._ledger.parked.entries())
        # A level that the tenant will leave cannot prevent the wake-up.
        force = bool(parked_tenant.outdated(parked, self.parkable))
        if any(self._ledger.parked.wake(life, force) == errno.ENOSPC for life in parked.members):
            sock.close()
            self._release(parked.away)
            why = parked_tenant.full_level(parked, self._ledger, self._enforcer)
            self._wait(parked, why or "a surrounding group has no room")
            return
        parked.enter(Phase.WAKING)
        self._ask(parked, sock, Goal.WAKE)

    def _wait(self, parked: ParkedTenant, why: str, has_claim: bool = False) -> None:
        if not parked.why:  # later reasons differ only in numbers
            self._history.add("wake waits", tenant=parked.name, bytes=parked.bytes, text=why)
        parked.enter(Phase.WAITING, why)
        parked.has_claim, parked.next_at = has_claim, time.monotonic() + AGAIN_SECONDS

    # -- the driver's states

    def _ask_for_states(self, parked: ParkedTenant) -> None:
        parked.enter(Phase.UNKNOWN, parked.why or "interrupted")
        parked.next_at = time.monotonic() + AGAIN_SECONDS
        if sock := parker_client.connected(self._run_dir):
            self._ask(parked, sock, None)
        else:
            parked.why = f"the parker does not run: {parker_client.fix()}"

    def _settle(self, parked: ParkedTenant, states: Mapping[str, str]) -> None:
        """Make the ledger agree with the driver. Wake processes in different states, or locked processes, together."""
        if lost := [life for life in parked.members if states.get(str(life[0])) == "failed"]:
            self._settle_lost(parked, lost)
        said = {states.get(str(pid), "unknown") for pid, _ in parked.members} - {"gone"}
        # Either all processes are parked or none. If one process runs, a process unknown to the driver is not parked.
        if said <= {"running"} or said == {"running", "unknown"}:
            self._settle_running(parked)
        elif said == {"checkpointed"}:
            self._settle_parked(parked)
        elif "unknown" in said:
            self._lose_sight(parked, "the driver does not report the state of all processes")
        else:
            self._release([life for life in parked.members if states.get(str(life[0])) == "checkpointed"])
            parked.shall_wake = parked.shall_wake or f"interrupted: {parked.why}"
            self._wake_later(parked)

    # -- reports

    def _remove(self, parked: ParkedTenant, error: str) -> None:
        """Remove a tenant that runs or has ended. `error`: the error of unfinished requests."""
        parked.close_request()
        parked.enter(Phase.UNKNOWN)
        self._tenants.pop(parked.cgroup, None)
        for goal in Goal:
            parked.finish(goal, error)
        self._enforcer.moves.catch_up(pid for pid, _ in parked.members)
        self._enforcer.release_left()

    def stop(self) -> None:
        """End all threads and connections. The next agent takes over the tenants."""
        for parked in self._tenants.values():
            parked.close_request()
            parked.enter(Phase.UNKNOWN)

    def tenants(self) -> list[ParkedTenant]:
        """Return the tenants that do not run or are about to be parked, longest wait first."""
        return sorted(self._tenants.values(), key=lambda parked: parked.since)

    def names(self) -> list[str]:
        """Return the names of the tenants that do not run."""
        return sorted(parked.name for parked in self._tenants.values())

    def is_away(self, cgroup: int) -> bool:
        """Return whether a tenant does not run, or is about to be parked."""
        return cgroup in self._tenants

    def view(self, cgroup: int) -> ParkingView | None:
        """Return the state of a tenant's parking, or None if the tenant was not parked since the agent's start."""
        return parked_tenant.view_of(self._tenants.get(cgroup), self.totals.get(cgroup))
