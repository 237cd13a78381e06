"""Time slices: what processes say of themselves goes to `turns`, what it decides goes to their gates.

Owns: a thread that sleeps on the bells of status pages until a turn is due, the shares as last read, the `turns` map.
Never: waits for a tenant, costs anything where no tenant has compute. When it fails: an OSError is counted and tried
again; anything else ends the process, whose pages no longer beat, and shims open their gates.

A wake-up costs more than what is done in it, so there are few: at the end of a turn, when its work has drained, when
somebody comes, when shares change, and now and then a look at whoever holds the device while others wait.
"""

from __future__ import annotations

import _thread
import os
import signal
import traceback
from dataclasses import asdict
from time import monotonic_ns
from typing import Any

from fgpu_ebpf import futex, nested_shares, pages, scheduler
from fgpu_ebpf.clients import Client
from fgpu_ebpf.desks import Desk, let_meet, seen_of
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.places import BUCKETS_NS, NEVER_NS, Place, Seen
from fgpu_ebpf.scheduler import Share
from fgpu_ebpf.timebook import TurnCounts
from fgpu_ebpf.turns import MS, Turns

SHARES_NS, PUBLISH_NS, AGAIN_NS = 100 * MS, 500 * MS, 10 * MS
CROWD_LOOK_NS = 5 * MS  # at those whose bells are not watched
MOST_RINGS = 100  # in SHARES_NS; whoever rings more often is looked at now and then
QUANTUM_PARTS = 4  # of a quantum, the most that may be in flight, where that is less than the usual


class Slicer:
    """All processes of tenants with a share. Everything public may be called from any thread."""

    def __init__(self) -> None:
        self.ledger: Ledger | None = None
        self.is_told = False  # by `heed`, when shares have changed: else they are looked at in every SHARES_NS
        self._lock = _thread.allocate_lock()
        self._turns = Turns()
        self._desks: dict[int, list[Desk]] = {}  # by tenant: the level whose share it is
        self._seats: dict[int, tuple[int, Desk]] = {}  # by the client's id(): tenant and desk
        self._without: dict[int, Client] = {}  # a share, so far
        self._shares: dict[int, dict[int, Share]] = {}  # by level and device
        self._used: dict[int, frozenset[int]] = {}  # devices of a tenant
        self._epoch = -1
        self._shares_ns = self._publish_ns = NEVER_NS
        self._measured: tuple[int, dict[int, int]] = (0, {})
        self._shown: dict[int, frozenset[int]] = {}  # devices of which tenants were told of the last time
        self._wanted: set[int] = set()
        self._bells = futex.Bells()
        self._watched: list[Desk] = []
        self._unwatched: list[Desk] = []
        self._unheard: set[int] = set()  # tenants
        self._news: set[int] = set()  # tenants to be looked at, whoever has rung
        self._is_watching = self._started = self._ended = False
        self._errors = 0

    # -- who is there

    def greet(self, client: Client) -> None:
        """A client that has pages, or other pages than before: its gates are right before it sees them."""
        if client.status is None or self.ledger is None:
            return
        with self._lock:
            before = self._epoch
            self._read_shares(self.ledger)
            tenant, desk = self._seats.pop(id(client), (0, None))
            if desk:
                self._desks[tenant].remove(desk)
                desk.turn_to(client)
            self._seat(client, desk)
            looks_no_more = not self.is_told and self._shares_ns == NEVER_NS
            if looks_no_more:
                self._look_at_shares_later()
            others = self._epoch != before and (self._seats or self._started)
            if looks_no_more or others or id(client) in self._seats:
                self._start()

    def heed(self) -> None:
        """Shares may be others now: whoever is here gets what is theirs."""
        with self._lock:
            is_anybody_here = self._seats or self._without
            if self.ledger and is_anybody_here and self.ledger.times.epoch() != self._epoch:
                self._shares_ns = 0
                self._start()

    def part(self, client: Client) -> None:
        """A client has gone: its turn ends at once."""
        with self._lock:
            self._without.pop(id(client), None)
            tenant, desk = self._seats.pop(id(client), (0, None))
            if desk:
                self._desks[tenant].remove(desk)
                self._used.pop(tenant, None)  # its devices may have been its alone
                self._news.add(tenant)
                self._is_watching = False
                self._bells.nudge()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            _thread.start_new_thread(self._serve, ())
        self._bells.nudge()

    def _seat(self, client: Client, desk: Desk | None = None) -> None:
        levels = [level for level in client.levels if level in self._shares]
        if not levels:
            if desk:
                desk.open_all()
            self._without[id(client)] = client  # its page was born with open gates
            return
        self._without.pop(id(client), None)
        tenant, *around = levels
        self._turns.nest(tenant, around, monotonic_ns())
        desk = desk or Desk(client)
        desk.heard = -1
        desk.may_use(self._shares[tenant])
        self._seats[id(client)] = tenant, desk
        self._desks.setdefault(tenant, []).append(desk)
        self._is_watching = False
        self._news.add(tenant)
        self._publish_ns = min(self._publish_ns, monotonic_ns() + PUBLISH_NS)
        for device, share in self._shares[tenant].items():
            desk.set_budget(device, min(pages.BUDGET_NS, share.quantum_ns // QUANTUM_PARTS))
            desk.put(device, self._turns.places[tenant].gate(device))
        desk.open_all(but=self._shares[tenant])

    # -- shares

    def _look_at_shares_later(self) -> None:
        self._shares_ns = min(self._shares_ns, monotonic_ns() + SHARES_NS)

    def _read_shares(self, ledger: Ledger) -> None:
        epoch = ledger.times.epoch()
        if epoch == self._epoch:
            return
        found: dict[int, dict[int, Share]] = {}
        for (level, device), share in ledger.times.shares().items():
            found.setdefault(level, {})[device] = share
        self._epoch, self._shares = epoch, found
        self._turns.share_out({level: by[min(by)] for level, by in found.items()}, monotonic_ns())
        everybody = [*((desk.client, desk) for _, desk in self._seats.values())]
        others = [*self._without.values()]
        self._news |= self._desks.keys()
        self._desks, self._seats, self._without, self._used = {}, {}, {}, {}
        for client, desk in everybody:
            self._seat(client, desk)
        for client in others:
            self._seat(client)

    # -- the thread

    def _serve(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the thread that has handlers
        due_ns = 0
        try:
            while not self._ended:
                self._bells.wait(due_ns if due_ns < NEVER_NS else None)
                with self._lock:
                    self._bells.collect()
                    due_ns = self._try()
        except BaseException:
            traceback.print_exc()
            os._exit(os.EX_SOFTWARE)  # a failure, for whoever restarts services that fail; the ledger is the kernel's

    def _try(self) -> int:
        try:
            return self._turn()
        except OSError:
            self._errors += 1
            return monotonic_ns() + AGAIN_NS

    def _turn(self) -> int:
        """What is due now; answers when to come again."""
        now_ns = monotonic_ns()
        if self.ledger and now_ns >= self._shares_ns:
            self._shares_ns = now_ns + SHARES_NS
            self._read_shares(self.ledger)
            if not self._forgive() and (self.is_told or not (self._seats or self._without)):
                self._shares_ns = NEVER_NS
        if self._desks or self._news:
            self._step()
        if self.ledger and now_ns >= self._publish_ns:
            self._publish(self.ledger, now_ns)
        now_ns = monotonic_ns()
        due_ns = min(self._turns.due_ns(now_ns), self._publish_ns)
        if not self.is_told:
            due_ns = min(due_ns, self._shares_ns)  # else there is time until something else is due
        return min(due_ns, now_ns + CROWD_LOOK_NS) if self._unwatched else due_ns

    def _forgive(self) -> bool:
        """Answers whether anybody has rung."""
        rings = [desk.rings for _, desk in self._seats.values()]
        self._is_watching &= max(rings, default=0) <= MOST_RINGS
        for _, desk in self._seats.values():
            desk.rings = 0
        return any(rings)

    def _step(self) -> None:
        self._listen()
        is_new, is_other = True, False
        while is_new:
            self._news.update(self._turns.in_question())
            now_ns, news = monotonic_ns(), dict[int, Seen]()
            for tenant in self._news:
                if self._desks.get(tenant):
                    self._try_to_look(tenant, news)
                else:
                    self._turns.leave(tenant, now_ns)
                    self._desks.pop(tenant, None)
                    self._used.pop(tenant, None)
            self._news.clear()
            changed = self._turns.step(news, now_ns)
            for tenant in sorted(changed, key=self._is_open):  # first those that close
                self._set_gates(tenant)
            is_other |= bool(changed) or len(news) > 1  # who waits for whom
            is_new = self._turns.look_again()
            if is_new:
                futex.fence()  # who counts as in flight after this has seen its gate closed
        for tenant in self._turns.to_meet(monotonic_ns()):
            let_meet(self._desks.get(tenant, ()), monotonic_ns())
        if not self._is_watching:
            self._watch()
            is_other = True
        if is_other:
            self._mute()

    def _listen(self) -> None:
        for place, desk in enumerate(self._watched):
            if desk.rang():
                self._bells.heard(place, desk.heard)
                self._is_watching &= desk.rings <= MOST_RINGS
                self._mark(desk)
        for desk in self._unwatched:
            if desk.rang():
                self._mark(desk)

    def _mark(self, desk: Desk) -> None:
        self._look_at_shares_later()  # and then at who rings too often
        seat = self._seats.get(id(desk.client))
        if seat:
            self._news.add(seat[0])

    def _watch(self) -> None:
        desks = [desk for _, desk in self._seats.values()]
        quiet = [desk for desk in desks if desk.rings <= MOST_RINGS]
        self._watched = quiet[: futex.MOST_WORDS]
        self._unwatched = quiet[futex.MOST_WORDS :] + [desk for desk in desks if desk.rings > MOST_RINGS]
        self._bells.watch([desk.bell for desk in self._watched])
        for place, desk in enumerate(self._watched):
            desk.place = place
            self._bells.heard(place, max(0, desk.heard))
        for desk in self._unwatched:
            desk.place = -1
        self._unheard = set()
        self._is_watching = True

    def _mute(self) -> None:
        """Whose rings can wait does not wake us."""
        before, self._unheard = self._unheard, self._turns.unheard()
        for tenant in before ^ self._unheard:
            for desk in self._desks.get(tenant, ()):
                if desk.place >= 0:
                    self._bells.mute(desk.place, tenant in self._unheard)

    def _try_to_look(self, tenant: int, news: dict[int, Seen]) -> None:
        try:
            news[tenant] = self._look(tenant)
        except OSError:
            raise  # of the ledger: tried again
        except Exception:  # a defect that this tenant has found must not stop the others
            self._turns.faults += 1
            self._turns.forget(tenant)

    def _look(self, tenant: int) -> Seen:
        desks, place, used = self._desks[tenant], self._turns.places[tenant], self._used.get(tenant)
        for desk in desks:
            if desk.begins_to_use():
                desk.use(self._contexts(desk.client.pid))
                used = None
        if used is None:
            used = self._used[tenant] = frozenset().union(*(desk.used for desk in desks))
        since_ns = place.turn.opened_ns if place.turn else 0
        seen = seen_of(desks, used, place.number, since_ns, monotonic_ns())
        if seen.waiting or place.turn:
            self._wanted.add(tenant)
        return seen

    def _contexts(self, pid: int) -> set[int]:
        process = self.ledger.process(pid) if self.ledger else None
        return {device for device, count in enumerate(process.contexts) if count} if process else set()

    def _is_open(self, tenant: int) -> bool:
        return self._turns.places[tenant].is_open()

    def _set_gates(self, tenant: int) -> None:
        desks = self._desks.get(tenant)
        for device in self._shares.get(tenant, ()) if desks else ():
            word = self._turns.places[tenant].gate(device)
            for desk in desks or ():
                desk.put(device, word)

    # -- what is told

    def _publish(self, ledger: Ledger, now_ns: int) -> None:
        """Counts, and of the time since the last: who had how much, and how much each of those was to have."""
        since_ns, owned = self._measured
        places = {tenant: self._turns.places[tenant] for tenant in {*self._desks, *owned} & set(self._turns.places)}
        self._publish_ns = now_ns + PUBLISH_NS if self._desks else NEVER_NS
        self._measured = (now_ns, {t: places[t].counts.owned_ns for t in self._desks})
        wanted, self._wanted = self._wanted & set(places), set()
        for tenant, place in places.items():
            self._observe(tenant, place, ledger, now_ns)
            rivals = {t: places[t].share for t in wanted | {tenant} if places[t].seen.devices & place.seen.devices}
            rivals[tenant] = place.share
            had = max(0, place.counts.owned_ns - owned.get(tenant, place.counts.owned_ns))  # its place may be a new one
            part = had * scheduler.MILLION // max(1, now_ns - since_ns) if since_ns else 0
            entitled = nested_shares.entitled(rivals, {t: places[t].above[-1] for t in rivals if places[t].above})[
                tenant
            ]
            is_here = tenant in self._desks
            for device in place.seen.devices | self._shown.get(tenant, frozenset()):  # its last, where all have gone
                ledger.times.set_turns(tenant, device, _counts(place, device, part if is_here else 0, entitled))
        self._shown = {tenant: places[tenant].seen.devices for tenant in self._desks}

    def _observe(self, tenant: int, place: Place, ledger: Ledger, now_ns: int) -> None:
        if place.share.limited:
            ran = [ns for device in place.seen.devices if (ns := ledger.times.ran_ns(tenant, device)) is not None]
            if ran:
                self._turns.observed(tenant, max(ran), now_ns)

    def counts(self) -> dict[str, Any]:
        """Of every device, as plain values."""
        with self._lock:
            return {
                "bounds_ns": list(BUCKETS_NS),
                "devices": {str(device): asdict(counts) for device, counts in self._turns.devices.items()},
                "errors": self._errors,
                "faults": self._turns.faults,
            }

    def end(self) -> None:
        """Every gate is open: nobody schedules any more."""
        with self._lock:
            self._ended = True
            for _, desk in self._seats.values():
                desk.open_all()
            self._bells.nudge()


def _counts(place: Place, device: int, part: int, entitled: int) -> TurnCounts:
    counts, turn = place.counts, place.turn
    owner = int(device in place.free_on or (turn is not None and device in turn.devices and not turn.handed_ns))
    numbers = (counts.owned_ns, counts.waits, counts.wait_ns, counts.overruns, counts.switches, counts.throttled)
    return TurnCounts(*numbers, owner, part, entitled, int(device in place.free_on), place.since_ns or 0)
