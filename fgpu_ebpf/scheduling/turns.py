"""Turns on the devices, from the opening of a gate to the end of its drain: which tenants run, wait and stop.

The next gate opens LEAD_NS before a drain should end, so that the device is not idle until a thread has woken up and
launched work. The next turn is charged from the expected end of the drain. The module runs in threads of the gatekeeper
that hold the time slicer's lock, does no I/O and reads no clock. `fair_queue` determines the order of turns. A tenant
that shares no device with another tenant and has no ceiling is *free*: the tenant has no turns, and its gates stay
open. Wrong reports of a tenant cost at most its own turn. A *gang* is a tenant on several devices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fgpu_ebpf import abi
from fgpu_ebpf.scheduling import fair_queue, handover, lending, rivals, state
from fgpu_ebpf.scheduling.accounts import Accounts
from fgpu_ebpf.scheduling.fair_queue import Grant, Share
from fgpu_ebpf.scheduling.nested_shares import Unit
from fgpu_ebpf.scheduling.reports import Seen
from fgpu_ebpf.scheduling.share_groups import Units, first_inside, leave, waiters_of
from fgpu_ebpf.scheduling.state import Place, Turn
from fgpu_ebpf.scheduling.virtual_clock import Clocks

MS = 1_000_000
LEAST_NS = 100_000  # the minimum time between two steps without a wake-up by a tenant
REST_NS = 100 * MS  # while no tenant waits, a turn without work for this time is closed and not checked any more
SILENCE_NS = 1 * MS  # a closing turn lasts at most this much longer than its work in flight, until it is handed over
MOST_LATE_NS = 100 * MS  # the maximum charged for work that continued after the end of its turn
PAUSE_NS, MOST_PAUSE_NS = 1 * MS, 500 * MS  # bounds of the pause after a turn without a launch
STOPPED_NS = 10_000 * MS  # the pause if work remains in flight; ends earlier when that work has drained


class Turns:
    """All tenants with a share, on all devices of the host."""

    def __init__(self) -> None:
        self.places: dict[int, Place] = {}
        self._clocks, self._units = Clocks(), Units()
        self._lending = lending.Lending(self._clocks)
        self.devices = self._clocks.counts
        self.resets = 0  # tenants that were reset by forget()
        self._number, self._changed = 0, set[int]()
        self._here: dict[int, Place] = {}  # tenants with processes
        self._running: dict[int, Place] = {}  # tenants with a turn
        self._queue: dict[int, Place] = {}  # tenants that wait for a turn
        self._left: list[Place] = []  # tenants with work whose turn has ended in this step
        self._users_changed, self._is_drained, self._stepped_ns = False, False, 0

    # -- interface for the time slicer

    def share_out(self, shares: Mapping[int, Share], now_ns: int, concurrent: Collection[int] = ()) -> None:
        """Set all shares and the concurrent devices. The next step() must get observations of every tenant."""
        self._lending.concurrent.numbers = frozenset(concurrent)
        for tenant in set(self.places) - set(shares):
            del self.places[tenant]
            self._drop(tenant)
        self._changed, self._users_changed = self._changed & set(shares), True
        restarted = self._units.share_out(shares, now_ns)
        for tenant, share in shares.items():
            place = self.places.get(tenant)
            if place is None:
                self.places[tenant] = Place(tenant, share, Accounts(share, now_ns), asked=share)
            elif self._units.differs(place, share) or not restarted.isdisjoint(place.above):
                place.asked = share
                self._change(place, self._units.of(place.above), now_ns)

    def nest(self, tenant: int, levels: Sequence[int], now_ns: int) -> None:
        """Place a tenant inside these levels with shares, innermost first."""
        for change in [*self._units.nest(self.places, tenant, levels, now_ns)]:
            self._change(*change, now_ns)

    def _change(self, place: Place, above: tuple[Unit, ...], now_ns: int) -> None:
        """Set the units around a tenant after a change of its share or units. The tenant leaves the queue.

        The tenant joins the queue again when the tenant is next observed to wait.
        """
        place.change(above, now_ns)
        self._join(place, now_ns, is_waiting=False)
        self._users_changed = True
        self._leave_queue(place)

    def leave(self, tenant: int, now_ns: int) -> None:
        """Remove a tenant whose last process has exited, and end its turn."""
        if (place := self._here.pop(tenant, None)) is None:
            return
        if place.turn:
            self._finish(place, place.turn, now_ns)
        place.trust.forget_overrun()
        self._leave_queue(place)
        place.clear()
        self._users_changed = True

    def lose(self, tenant: int, now_ns: int) -> None:
        """Record that a process that reported work in flight has exited."""
        place = self._here.get(tenant)
        if place and place.turn and place.turn.closing_ns:
            place.trust.lost_process(now_ns)
        elif place and place.late_ns:
            place.trust.forget_overrun()

    def observed(self, tenant: int, device: int, ran_ns: int, now_ns: int) -> None:
        """Record a tenant's total time on a device by NVML. A tenant with a ceiling is charged for this time."""
        self.places[tenant].observe(device, ran_ns, now_ns)

    def in_question(self) -> list[int]:
        """Return the tenants that have a turn or were just preempted. Every step must get their observations."""
        cut = (place.tenant for place in self._queue.values() if place.cut)
        return [*self._running, *self._lending.tenants(), *cut]

    def without_wakeups(self) -> set[int]:
        """Return tenants whose wake-ups can wait for the next step, because these tenants outrank no awaited owner."""
        waiting = (*self._queue.values(), *self._preempted())
        return {place.tenant for place in waiting if place.waits_for_any(self._running.values())}

    def _preempted(self) -> list[Place]:
        """Return preempted tenants whose turn was handed over. These tenants queue again at the next step."""
        return [place for place in self._running.values() if place.is_preempted()]

    def step(self, observations: Mapping[int, Seen], now_ns: int) -> set[int]:
        """Apply new observations, and begin, extend and end turns. Return the tenants whose gates have changed."""
        self._stepped_ns = now_ns
        wanted = rivals.devices_of((*self._queue.values(), *self._preempted()))
        for tenant, seen in observations.items():
            if tenant in self.places:
                self._try_to_look(self.places[tenant], seen, wanted, now_ns)
        if self._users_changed:
            self._set_all_free(now_ns)
        self._lend(*self._lending.look(now_ns), now_ns)
        ready = self._ready(now_ns)
        for place in list(self._running.values()):
            self._let_run_or_close(place, ready, now_ns)
        self._grant(ready, now_ns)
        for place in self._left:
            leave(place, self._clocks.now(place.seen.devices, place.share.rank), now_ns)
        self._left.clear()
        changed, self._changed = self._changed, set()
        return changed

    def look_again(self) -> bool:
        """Return whether a step is due at once, because gates of a tenant without work in flight were just closed."""
        is_drained, self._is_drained = self._is_drained, False
        return is_drained

    def to_meet(self, now_ns: int) -> list[int]:
        """Return the gangs with CUDA kernels that wait for kernels behind closed gates, and prolong their turns."""
        return handover.late_gangs(self._running.values(), now_ns)

    def due_ns(self, now_ns: int) -> int:
        """Return when the next step is due if no tenant wakes the time slicer; NEVER_NS: only after a wake-up."""
        due = self._lending.due_ns(now_ns)
        waiting = self._preempted()
        for place in self._queue.values():
            at_ns = place.ready_ns()
            if at_ns > self._stepped_ns:  # even if at_ns has passed by now, because no step has considered at_ns yet
                due = min(due, at_ns)
            else:
                waiting.append(place)
        for place in self._running.values():
            if place.turn:
                due = min(due, place.turn_due_ns(place.turn, waiting, now_ns))
        return max(due, now_ns + LEAST_NS)

    # -- observations of tenants

    def _try_to_look(self, place: Place, seen: Seen, wanted: set[int], now_ns: int) -> None:
        try:
            self._look(place, seen, wanted, now_ns)
        except Exception:  # an error that this tenant's reports have triggered must not stop other tenants
            self.resets += 1
            self.forget(place.tenant)

    def forget(self, tenant: int) -> None:
        """Discard the reports of a tenant, and end the tenant's turn. The account stays, with the debts."""
        self._drop(tenant)
        self.places[tenant] = self.places[tenant].without_reports(self._next_number())
        self._changed.add(tenant)
        self._users_changed = True

    def _drop(self, tenant: int) -> None:
        for places in (self._here, self._running, self._queue):
            places.pop(tenant, None)

    def _look(self, place: Place, seen: Seen, wanted: set[int], now_ns: int) -> None:
        if seen.launches != place.seen.launches:
            place.pause_ns = place.pause_until_ns = 0
        is_new = seen.devices != place.seen.devices or place.tenant not in self._here
        self._here[place.tenant] = place
        place.seen = seen
        if is_new:
            self._users_changed = True
            self._join(place, now_ns, is_waiting=False)
        if place.late_ns and seen.drained:
            place.charge(min(now_ns - place.late_ns, MOST_LATE_NS))
            place.late_ns = place.pause_ns = place.pause_until_ns = 0
            if seen.devices:  # otherwise the processes have exited, and nothing proves that there was work
                place.trust.ended(seen.ended_ns, now_ns)
        turn, place.cut = place.turn, False
        if turn and turn.closing_ns:
            if seen.drained or now_ns >= turn.deadline_ns:
                self._finish(place, turn, now_ns)
        elif turn:
            self._look_at_owner(place, turn, bool(wanted and turn.devices & wanted), now_ns)
        if not place.turn and not place.free_on and not place.cut:
            self._look_at_waiter(place, now_ns)

    def _look_at_owner(self, place: Place, turn: Turn, wanted: bool, now_ns: int) -> None:
        """Charge an owner for the time since the last check, and record when the owner was last active."""
        seen, since_ns = place.seen, max(turn.charged_ns, place.begun_ns(turn))
        if seen.launches != turn.launches:
            if turn.rest_ns:  # the last check was during a think time
                place.thinks.add(max(turn.rest_ns, seen.idle_ns))
            wanted_ns = seen.wanted_ns if turn.charged_ns <= seen.wanted_ns <= now_ns else now_ns
            turn.launches, turn.active_ns = seen.launches, max(turn.active_ns, wanted_ns)
        busy_ns = seen.busy_until_ns if seen.in_flight else min(seen.ended_ns, now_ns)
        turn.active_ns = max(turn.active_ns, busy_ns)
        until_ns, idle_ns = now_ns, 0
        if not wanted:  # idle time is not charged while no other tenant waits for the devices
            until_ns, idle_ns = min(now_ns, turn.active_ns), max(0, seen.idle_ns - turn.rest_ns)
        turn.rest_ns = 0 if seen.in_flight else max(0, now_ns - seen.ended_ns)
        place.count_up(now_ns)
        place.charge(min(abi.LEASE_NS, until_ns - since_ns - idle_ns))  # after the lease, all gates were open
        place.busy_ns = 0 if place.is_idle(turn, now_ns) else place.busy_ns + max(0, now_ns - turn.charged_ns)
        turn.charged_ns = max(turn.charged_ns, now_ns)

    def _look_at_waiter(self, place: Place, now_ns: int) -> None:
        if not place.seen.waiting or not place.seen.devices:  # a turn without a device would be extended to all devices
            self._leave_queue(place)
        elif place.since_ns is None:
            if place.seen.wanted_ns > place.seen.ended_ns > 0 and not place.seen.in_flight:  # end of a think time
                place.thinks.add(place.seen.wanted_ns - place.seen.ended_ns)
            self._join(place, now_ns)

    def _join(self, place: Place, now_ns: int, is_waiting: bool = True) -> None:
        is_first = first_inside(place, (*self._queue.values(), *self._running.values()))
        place.join(self._clocks.now(place.seen.devices, place.share.rank), now_ns, is_first)
        if is_waiting:
            place.since_ns, self._queue[place.tenant] = now_ns, place

    def _leave_queue(self, place: Place) -> None:
        place.since_ns = None
        self._queue.pop(place.tenant, None)

    # -- tenants that are free

    def _set_all_free(self, now_ns: int) -> None:
        self._users_changed = False
        self._lend([], self._lending.restart(self._here.values(), now_ns), [], now_ns)
        for place, before in [*lending.set_free(self._here.values())]:
            self._changed.add(place.tenant)
            if place.free_on:
                self._end_turn(place)
            elif place.seen.devices:  # the tenant is running, so it gets a turn now
                self._open(place, Grant(place.tenant, before & place.seen.devices), now_ns)

    def _lend(self, begin: list[Place], end: list[Place], change: list[Place], now_ns: int) -> None:
        """Open the gates of `begin`, and close the gates of `end`. Hold or release tenants of lent devices."""
        for place in begin:
            self._end_turn(place)
        here = [place for place in end if self.places.get(place.tenant) is place]
        self._changed |= lending.switch(begin, here, change, self._next_number, now_ns)
        for place in here:  # threads of held tenants wait at the gate already, and report nothing
            self._look_at_waiter(place, now_ns)

    # -- tenants that continue, and tenants that stop

    def _ready(self, now_ns: int) -> list[Place]:
        """Return the queued tenants that may begin."""
        found = []
        for place in self._queue.values():
            if place.limit_ready_ns() > now_ns:
                place.hold_back(is_new=not place.held_back)
            elif place.pause_until_ns <= now_ns:
                place.held_back = False
                found.append(place)
        return found

    def _let_run_or_close(self, place: Place, ready: list[Place], now_ns: int) -> None:
        """Continue or extend a turn with open gates, or close its gates. The first row that applies decides.

        a limit leaves no time in hand                     close the gates
        another owner needs one of the devices             close the gates at the end of the quantum, or when idle
        no ready tenant waits for the devices              continue; close the gates after a rest of REST_NS
        the tenant is idle, or a higher priority is ready  close the gates
        the quantum is over                                extend the turn if the tenant is next, or close the gates
        """
        if (turn := place.turn) is None or turn.closing_ns:
            return
        others = state.wanting(turn, ready)
        if place.is_spent():
            place.hold_back(is_new=True)
            self._close(place, turn, now_ns)
        elif turn.devices & rivals.missing(self._running.values(), but=place):
            if now_ns >= turn.ends_ns or place.is_idle(turn, now_ns):
                self._close(place, turn, now_ns)
        elif not others:
            self._go_on_alone(place, turn, now_ns)
        elif place.is_idle(turn, now_ns) or rivals.outranked(place, turn, others, now_ns):
            self._close(place, turn, now_ns)
        elif now_ns >= place.ends_ns(turn, others):
            if rivals.comes_first_again(place, turn, ready, self._running.values(), self._clocks.floors, now_ns):
                self._extend(place, turn, now_ns)
            else:
                self._close(place, turn, now_ns)

    def _go_on_alone(self, place: Place, turn: Turn, now_ns: int) -> None:
        if now_ns - turn.active_ns >= REST_NS:
            turn.rested = True
            self._close(place, turn, now_ns)
        elif now_ns >= turn.ends_ns:
            self._extend(place, turn, now_ns)

    def _extend(self, place: Place, turn: Turn, now_ns: int) -> None:
        turn.ends_ns = now_ns + place.share.quantum_ns
        turn.floor = False
        turn.since_ns, turn.virtual_ns = now_ns, place.begins(turn.devices)
        self._clocks.turn_begins(turn.virtual_ns, place.share.rank)

    # -- one turn, from beginning to end

    def _grant(self, ready: list[Place], now_ns: int) -> None:
        lacking = rivals.missing(self._running.values())
        in_use = handover.taken(self._running.values(), now_ns) if ready or lacking else set()
        if not lacking and all(not place.seen.devices.isdisjoint(in_use) for place in ready):
            return
        for place in self._running.values():
            turn = place.turn
            if turn and not turn.closing_ns and (more := (place.seen.devices - turn.devices)):
                turn.devices |= more - in_use
                in_use |= more
                self._changed.add(place.tenant)
        waiters = waiters_of(ready, self._running.values(), now_ns)
        for grant in fair_queue.next_turns(waiters, fair_queue.wanted(waiters) - in_use, self._clocks.floors, now_ns):
            self._open(self.places[grant.tenant], grant, now_ns)

    def _open(self, place: Place, grant: Grant, now_ns: int) -> None:
        begins_ns = handover.next_begins_ns(self._running.values(), grant.devices, now_ns)
        times = (now_ns, begins_ns, begins_ns, begins_ns + place.share.quantum_ns, now_ns)
        first = (place.seen.launches, begins_ns, place.begins(grant.devices))
        place.number = self._next_number()
        place.turn = Turn(set(grant.devices), place.number, grant.floor, *times, *first)
        place.late_ns = 0
        place.trust.begins_again(place.seen.busy_until_ns, now_ns)
        place.count_up(now_ns)
        for device in grant.devices:
            counts = place.counts[device]
            counts.switches += 1
            self._clocks.count(device).switches += 1
            if place.since_ns is not None:
                counts.waits += 1
                counts.wait_ns += max(0, now_ns - place.since_ns)
        self._leave_queue(place)
        self._clocks.turn_begins(place.turn.virtual_ns, place.share.rank, now_ns if grant.floor else 0)
        self._running[place.tenant] = place
        self._changed.add(place.tenant)

    def _next_number(self) -> int:
        self._number = (self._number + 1) & 0x3FFFFFFF
        return self._number

    def _end_turn(self, place: Place) -> None:
        place.turn = None
        self._running.pop(place.tenant, None)
        self._leave_queue(place)
        self._changed.add(place.tenant)

    def _close(self, place: Place, turn: Turn, now_ns: int) -> None:
        """Close the gates. The turn lasts until nothing is in flight, or until its deadline."""
        turn.closing_ns, turn.cut = now_ns, not place.is_idle(turn, now_ns)
        self._is_drained |= not place.seen.in_flight
        turn.deadline_ns = now_ns + max(place.flight_ns(now_ns), abi.BUDGET_NS) + SILENCE_NS
        place.trust.claims(now_ns, place.claim_ns(now_ns))
        self._changed.add(place.tenant)

    def _finish(self, place: Place, turn: Turn, now_ns: int) -> None:
        """Charge the rest of a turn, count the drain, and end the turn. `place.turn` is kept until all is charged."""
        place.count_up(now_ns)
        ended_ns = min(now_ns, turn.active_ns) if turn.rested else place.ended_ns(turn, now_ns)
        passed_ns = now_ns
        if turn.handed_ns and place.seen.drained:
            ended_ns = passed_ns = place.passed_ns(turn)
            handover.begin_earlier(self._running.values(), turn, ended_ns)
        place.charge(min(abi.LEASE_NS, ended_ns - max(turn.charged_ns, place.begun_ns(turn))))
        if turn.closing_ns:
            overrun = not place.seen.drained and not turn.rested  # a rested tenant has no work
            for device in turn.devices:
                self._clocks.count(device).add(passed_ns - turn.closing_ns, overrun)
            place.judge(turn, overrun, now_ns)
        if turn.floor:
            place.lifted(turn, passed_ns)
        if place.seen.launches == turn.launches and turn.active_ns == turn.opened_ns:
            place.pause_ns = STOPPED_NS if place.late_ns else min(max(PAUSE_NS, 4 * place.pause_ns), MOST_PAUSE_NS)
            place.pause_until_ns = now_ns + place.pause_ns
        else:
            leave(place, self._clocks.now(place.seen.devices, place.share.rank), now_ns)
            self._left.append(place)
        self._end_turn(place)
        if turn.cut and place.seen.drained and place.seen.devices:  # queued again without a wake-up by a thread
            place.cut = True
            self._join(place, now_ns)
            place.since_ns = min(passed_ns, now_ns)
