"""Turns on the devices, from the opening of a gate to the end of its drain: who runs, who waits, who must stop.

The next gate opens LEAD_NS before a drain should be over, so that the device need not wait until somebody has woken up
and launched; the turns themselves are charged as if one had begun where the other should have ended.

Owns: the accounts of the tenants, the turns that are under way, what is counted of them. Never: does I/O or asks the
time; `scheduler` says who comes first. Cannot fail: what tenants say of themselves costs them their own turn at most.

A tenant that shares no device with another and has no ceiling is *free*: it has no turns and its gates are no gates.
Nothing here goes through all tenants but what comes of somebody's coming or going.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fgpu_ebpf import pages, scheduler
from fgpu_ebpf.clocks import Clocks
from fgpu_ebpf.nested_shares import Unit
from fgpu_ebpf.places import FLOOR_TURN_NS, NEVER_NS, NOTHING, Place, Seen, Turn, missing, taken, wanting
from fgpu_ebpf.scheduler import Grant, Share
from fgpu_ebpf.units import Units, first_inside, waiters_of

MS = 1_000_000
FLOOR_PARTS = scheduler.FLOOR_NS // FLOOR_TURN_NS  # whose turn was longer than that is lifted so much later
LEAST_NS = 100_000  # between two looks that nobody rang for
REST_NS = 100 * MS  # idle for as long with nobody waiting: the gate closes, and nobody looks any more
SILENCE_NS = 1 * MS  # beyond the work in flight
MOST_LATE_NS = 100 * MS  # charged of work that went on after the turn had passed
SHY_NS, MOST_SHY_NS = 1 * MS, 500 * MS  # not asked again, after a turn of which nothing came
STOPPED_NS = 10_000 * MS  # the same, where something is in flight all the while: until that has drained, as a rule


class Turns:
    """All tenants with a share, on all devices of the host."""

    def __init__(self) -> None:
        self.places: dict[int, Place] = {}
        self._clocks, self._units = Clocks(), Units()
        self.devices = self._clocks.counts
        self.faults = 0  # tenants that were forgotten
        self._number = 0
        self._changed: set[int] = set()
        self._here: dict[int, Place] = {}  # those that have processes
        self._running: dict[int, Place] = {}  # those that have a turn
        self._queue: dict[int, Place] = {}  # those that want one
        self._users_changed, self._is_dry, self._stepped_ns = False, False, 0

    # -- what the slicer asks

    def share_out(self, shares: Mapping[int, Share], now_ns: int) -> None:
        """From now on these tenants have these shares; the next step is to be told of everybody."""
        for tenant in set(self.places) - set(shares):
            del self.places[tenant]
            for places in (self._here, self._running, self._queue):
                places.pop(tenant, None)
        self._changed, self._users_changed = self._changed & set(shares), True
        self._units.share_out(shares, now_ns)
        for tenant, share in shares.items():
            place = self.places.get(tenant)
            if place is None:
                self.places[tenant] = Place(tenant, share, scheduler.opening(share, now_ns), asked=share)
            elif self._units.differs(place, share):
                place.asked = share
                self._change(place, self._units.of(place.above), now_ns)

    def nest(self, tenant: int, levels: Sequence[int], now_ns: int) -> None:
        """This tenant lies inside these levels with shares, innermost first."""
        for change in [*self._units.nest(self.places, tenant, levels)]:
            self._change(*change, now_ns)

    def _change(self, place: Place, above: tuple[Unit, ...], now_ns: int) -> None:
        """It has another share, or others around it: it joins anew, among its equals."""
        if place.change(above, now_ns):
            self._join(place, now_ns, is_waiting=False)
        self._users_changed = True
        self._stand_back(place)

    def leave(self, tenant: int, now_ns: int) -> None:
        """The last of its processes has gone, and its turn with it."""
        place = self._here.pop(tenant, None)
        if place is None:
            return
        if place.turn:
            self._finish(place, place.turn, now_ns)
        self._stand_back(place)
        place.seen, place.free_on, place.late_ns, place.busy_ns = NOTHING, frozenset(), 0, 0
        self._users_changed = True

    def observed(self, tenant: int, ran_ns: int, now_ns: int) -> None:
        """NVML has seen it run for so long in all: with a ceiling it is charged that at the least."""
        place = self.places[tenant]
        if place.share.limited:
            place.count_up(now_ns)
            place.charge(place.observed.short_ns(ran_ns, place.counts.owned_ns, now_ns))

    def in_question(self) -> list[int]:
        """Those whose turn it is, or was cut a moment ago: of these every step is to be told."""
        return [*self._running, *(tenant for tenant, place in self._queue.items() if place.cut)]

    def unheard(self) -> set[int]:
        """Those who wait for somebody whom they do not outrank: what they ring for can wait until the next step."""
        owners = self._running.values()
        waiting = [*self._queue.values(), *self._coming_back()]
        return {place.tenant for place in waiting if any(place.waits_for(owner) for owner in owners)}

    def _coming_back(self) -> list[Place]:
        """Their turn was cut and has passed to another: they are looked at when something else is due."""
        return [place for place in self._running.values() if place.comes_back()]

    def step(self, news: Mapping[int, Seen], now_ns: int) -> set[int]:
        """What is new of these; answers the tenants whose gates are others now."""
        self._stepped_ns, waiting = now_ns, (*self._queue.values(), *self._coming_back())
        wanted = {device for place in waiting for device in place.seen.devices}
        for tenant, seen in news.items():
            place = self.places.get(tenant)
            if place:
                self._try_to_look(place, seen, wanted, now_ns)
        if self._users_changed:
            self._set_all_free(now_ns)
        ripe = self._ripe(now_ns)
        for place in list(self._running.values()):
            self._let_run_or_close(place, ripe, now_ns)
        self._grant(ripe, now_ns)
        changed, self._changed = self._changed, set()
        return changed

    def look_again(self) -> bool:
        """Some gates close where nothing is in flight: the turn has ended, if that is so once they are closed."""
        is_dry, self._is_dry = self._is_dry, False
        return is_dry

    def to_meet(self, now_ns: int) -> list[int]:
        """Gangs whose gates are closed between kernels that wait for each other; they have a little longer."""
        found = []
        for place in self._running.values():
            turn = place.turn
            if turn and 0 < place.meets_ns(turn) <= now_ns < turn.closing_ns + place.share.quantum_ns:
                turn.deadline_ns = max(turn.deadline_ns, now_ns + pages.BUDGET_NS)
                found.append(place.tenant)
        return found

    def due_ns(self, now_ns: int) -> int:
        """When to step again, if nobody rings before; NEVER_NS: not before."""
        due = NEVER_NS
        waiting = self._coming_back()
        for place in self._queue.values():
            at_ns = place.ripe_ns()
            if at_ns > self._stepped_ns:  # and may be ripe by now, of which no step has been told
                due = min(due, at_ns)
            else:
                waiting.append(place)
        for place in self._running.values():
            if place.turn:
                due = min(due, place.turn_due_ns(place.turn, waiting, now_ns))
        return max(due, now_ns + LEAST_NS)

    # -- looking

    def _try_to_look(self, place: Place, seen: Seen, wanted: set[int], now_ns: int) -> None:
        try:
            self._look(place, seen, wanted, now_ns)
        except Exception:  # a defect that this tenant has found must not stop the others
            self.faults += 1
            self.forget(place.tenant)

    def forget(self, tenant: int) -> None:
        """Nothing that this tenant has said is relied on any more, and its turn ends. Its account stays: debts do."""
        place = self.places[tenant]
        for places in (self._here, self._running, self._queue):
            places.pop(tenant, None)
        self.places[tenant] = place.afresh()
        self._changed.add(tenant)
        self._users_changed = True

    def _look(self, place: Place, seen: Seen, wanted: set[int], now_ns: int) -> None:
        if seen.launches != place.seen.launches:
            place.shy_ns = place.shy_until_ns = 0
        self._users_changed |= seen.devices != place.seen.devices or place.tenant not in self._here
        self._here[place.tenant] = place
        place.seen = seen
        if place.late_ns and seen.drained:
            place.charge(min(now_ns - place.late_ns, MOST_LATE_NS))
            place.late_ns = place.shy_ns = place.shy_until_ns = 0
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
        seen, since_ns = place.seen, max(turn.charged_ns, place.begun_ns(turn))
        if seen.launches != turn.launches:
            said = seen.wanted_ns if turn.charged_ns <= seen.wanted_ns <= now_ns else now_ns
            turn.launches, turn.active_ns = seen.launches, max(turn.active_ns, said)
        busy_ns = seen.busy_until_ns if seen.in_flight else min(seen.ended_ns, now_ns)
        turn.active_ns = max(turn.active_ns, busy_ns)
        until_ns, idle_ns = now_ns, 0
        if not wanted:  # by others: then rests cost nothing
            until_ns, idle_ns = min(now_ns, turn.active_ns), max(0, seen.idle_ns - turn.rest_ns)
        turn.rest_ns = 0 if seen.in_flight else max(0, now_ns - seen.ended_ns)
        place.count_up(now_ns)
        place.charge(until_ns - since_ns - idle_ns)
        place.busy_ns = 0 if place.is_idle(turn, now_ns) else place.busy_ns + max(0, now_ns - turn.charged_ns)
        turn.charged_ns = max(turn.charged_ns, now_ns)

    def _look_at_waiter(self, place: Place, now_ns: int) -> None:
        if not place.seen.waiting:
            self._stand_back(place)
        elif place.since_ns is None:
            self._join(place, now_ns)

    def _join(self, place: Place, now_ns: int, is_waiting: bool = True) -> None:
        is_first = first_inside(place, (*self._queue.values(), *self._running.values()))
        place.join(self._clocks.now(place.seen.devices, place.share.rank), now_ns, is_first)
        if is_waiting:
            place.since_ns, self._queue[place.tenant] = now_ns, place

    def _stand_back(self, place: Place) -> None:
        place.since_ns = None
        self._queue.pop(place.tenant, None)

    # -- free or not

    def _set_all_free(self, now_ns: int) -> None:
        self._users_changed = False
        users = Counter(device for place in self._here.values() for device in place.seen.devices)
        for place in self._here.values():
            self._set_free(place, users, now_ns)

    def _set_free(self, place: Place, users: Counter[int], now_ns: int) -> None:
        before = place.free_on
        alone = not place.share.limited and all(users[device] == 1 for device in place.seen.devices)
        place.free_on = place.seen.devices if alone else frozenset()
        if place.free_on == before:
            return
        self._changed.add(place.tenant)
        if place.free_on:
            place.turn = None
            self._running.pop(place.tenant, None)
            self._stand_back(place)
        elif place.seen.devices:  # what it has begun is its turn
            self._open(place, Grant(place.tenant, before & place.seen.devices), now_ns)

    # -- who waits, and who stops for whom

    def _ripe(self, now_ns: int) -> list[Place]:
        """Those that may begin."""
        found = []
        for place in self._queue.values():
            if place.let_in_ns() > now_ns:
                place.counts.throttled += not place.held_back
                place.held_back = True
            elif place.shy_until_ns <= now_ns:
                place.held_back = False
                found.append(place)
        return found

    def _let_run_or_close(self, place: Place, ripe: list[Place], now_ns: int) -> None:
        turn = place.turn
        if turn is None or turn.closing_ns:
            return
        rivals = wanting(turn, ripe)
        if place.is_spent():
            place.held_back = True
            place.counts.throttled += 1
            self._close(place, turn, now_ns)
        elif turn.devices & missing(self._running.values(), but=place):
            if now_ns >= turn.ends_ns or place.is_idle(turn, now_ns):
                self._close(place, turn, now_ns)
        elif not rivals:
            self._go_on_alone(place, turn, now_ns)
        elif place.is_idle(turn, now_ns) or self._outranked(place, turn, rivals, now_ns):
            self._close(place, turn, now_ns)
        elif now_ns >= place.ends_ns(turn, rivals):
            if self._comes_first_again(place, turn, ripe, now_ns):
                self._extend(place, turn, now_ns)
            else:
                self._close(place, turn, now_ns)

    def _go_on_alone(self, place: Place, turn: Turn, now_ns: int) -> None:
        if now_ns - turn.active_ns >= REST_NS:
            turn.rested = True
            self._close(place, turn, now_ns)
        elif now_ns >= turn.ends_ns:
            self._extend(place, turn, now_ns)

    @staticmethod
    def _outranked(place: Place, turn: Turn, rivals: Iterable[Place], now_ns: int) -> bool:
        if turn.floor and now_ns < turn.opened_ns + FLOOR_TURN_NS:
            return False
        return any(rival.share.rank < place.share.rank for rival in rivals)

    def _comes_first_again(self, place: Place, turn: Turn, ripe: Iterable[Place], now_ns: int) -> bool:
        ahead_ns = place.flight_ns(now_ns)  # it pays for that in any case
        waiters = [*waiters_of(ripe, self._running.values(), now_ns), place.waiter(now_ns, ahead_ns, ahead_ns)]
        free = scheduler.wanted(waiters) - taken(self._running.values(), now_ns) | turn.devices
        found = scheduler.next_turns(waiters, free, self._clocks.floors, now_ns)
        return any(grant.tenant == place.tenant for grant in found)

    def _extend(self, place: Place, turn: Turn, now_ns: int) -> None:
        turn.ends_ns = now_ns + place.share.quantum_ns
        turn.floor = False
        self._clocks.turn_begins(turn.devices, place.share.rank, place.begins())

    # -- a turn, from beginning to end

    def _grant(self, ripe: list[Place], now_ns: int) -> None:
        in_use = taken(self._running.values(), now_ns)
        if not missing(self._running.values()) and not any(place.seen.devices.isdisjoint(in_use) for place in ripe):
            return
        for place in self._running.values():
            turn = place.turn
            if turn and not turn.closing_ns and (more := (place.seen.devices - turn.devices)):
                turn.devices |= more - in_use
                in_use |= more
                self._changed.add(place.tenant)
        waiters = waiters_of(ripe, self._running.values(), now_ns)
        for grant in scheduler.next_turns(waiters, scheduler.wanted(waiters) - in_use, self._clocks.floors, now_ns):
            self._open(self.places[grant.tenant], grant, now_ns)

    def _open(self, place: Place, grant: Grant, now_ns: int) -> None:
        self._number = (self._number + 1) & 0x3FFFFFFF
        begins_ns = self._take_over(grant.devices, now_ns)
        times = (now_ns, begins_ns, begins_ns, begins_ns + place.share.quantum_ns, now_ns)
        place.turn = Turn(set(grant.devices), self._number, grant.floor, *times, place.seen.launches)
        place.number, place.late_ns = self._number, 0
        place.trust.begins_again(place.seen.busy_until_ns, now_ns)
        place.count_up(now_ns)
        place.counts.switches += 1
        for device in grant.devices:
            self._clocks.count(device).switches += 1
        if place.since_ns is not None:
            place.counts.waits += 1
            place.counts.wait_ns += max(0, now_ns - place.since_ns)
            self._stand_back(place)
        lifted_ns = now_ns if grant.floor else 0
        self._clocks.turn_begins(grant.devices, place.share.rank, place.begins(), lifted_ns)
        self._running[place.tenant] = place
        self._changed.add(place.tenant)

    def _take_over(self, devices: frozenset[int], now_ns: int) -> int:
        """When the turns that are passing there should have drained: until then the device is theirs."""
        begins_ns = now_ns
        for place in self._running.values():
            if place.turn and not place.turn.handed_ns and place.turn.devices & devices:
                place.turn.handed_ns = now_ns + place.flight_ns(now_ns)
                begins_ns = max(begins_ns, place.turn.handed_ns)
        return begins_ns

    def _close(self, place: Place, turn: Turn, now_ns: int) -> None:
        """Its gates close; the turn lasts until nothing is in flight, or patience ends."""
        turn.closing_ns, turn.cut = now_ns, not place.is_idle(turn, now_ns)
        self._is_dry |= not place.seen.in_flight
        turn.deadline_ns = now_ns + max(place.flight_ns(now_ns), pages.BUDGET_NS) + SILENCE_NS
        place.trust.claims(now_ns, place.claim_ns(now_ns))
        self._changed.add(place.tenant)

    def _finish(self, place: Place, turn: Turn, now_ns: int) -> None:
        place.count_up(now_ns)
        ended_ns = min(now_ns, turn.active_ns) if turn.rested else place.ended_ns(turn, now_ns)
        passed_ns = now_ns
        if turn.handed_ns and place.seen.drained:
            ended_ns = passed_ns = place.passed_ns(turn)
            self._begin_earlier(turn, ended_ns)
        place.charge(ended_ns - max(turn.charged_ns, place.begun_ns(turn)))
        if turn.closing_ns:
            overrun = not place.seen.drained and not turn.rested  # its work has ended, and it has not looked
            for device in turn.devices:
                self._clocks.count(device).add(passed_ns - turn.closing_ns, overrun)
            place.counts.overruns += overrun
            place.late_ns = now_ns if overrun else 0
            if overrun:
                place.trust.overran(now_ns)
        if turn.floor:
            over_ns = passed_ns - turn.opened_ns - FLOOR_TURN_NS - pages.BUDGET_NS
            place.unlifted_ns = passed_ns + FLOOR_PARTS * max(0, over_ns)
        if place.seen.launches == turn.launches and turn.active_ns == turn.opened_ns:
            place.shy_ns = STOPPED_NS if place.late_ns else min(max(SHY_NS, 4 * place.shy_ns), MOST_SHY_NS)
            place.shy_until_ns = now_ns + place.shy_ns
        place.turn = None
        self._running.pop(place.tenant, None)
        self._changed.add(place.tenant)
        if turn.cut and place.seen.drained:  # it comes back: nobody has to be woken up for that
            place.cut = True
            self._join(place, now_ns)
            place.since_ns = min(passed_ns, now_ns)

    def _begin_earlier(self, before: Turn, ended_ns: int) -> None:
        """Of the turns that were to begin when that one should have drained: it has drained now."""
        for place in self._running.values():
            turn = place.turn
            if turn and turn is not before and turn.begins_ns == before.handed_ns and turn.devices & before.devices:
                since_ns = max(ended_ns, place.begun_ns(turn))
                place.charge(turn.begins_ns - since_ns)
