"""The time slicer: a thread of the gatekeeper that reads the claims of processes, and opens and closes their gates.

`scheduling.turns` makes the decisions. The thread sleeps until the next decision is due or a process wakes the thread
by the futex in the process's status page. The thread reads the shares and writes the `turns` map. The thread never
waits for a tenant, and does not run if no tenant has a share of compute time. After an OSError, which is counted, the
step is repeated. Any other exception ends the process: heartbeats on pages stop, and shims open their gates.

A wake-up costs more than the work of the thread in one step, so the thread wakes rarely: at the end of a turn, when the
work of the turn has drained, when a process registers, when shares change, and at intervals to examine the owner of a
device while other tenants wait.
"""

from __future__ import annotations

import _thread
import itertools
import os
import signal
import traceback
from dataclasses import asdict, replace
from time import monotonic_ns
from typing import Any

from fgpu_ebpf import abi
from fgpu_ebpf.gatekeeper.process_gates import ProcessGates, let_gang_through, observe_processes
from fgpu_ebpf.gatekeeper.sessions import Session
from fgpu_ebpf.gatekeeper.turn_rows import UnitRows, counts_of
from fgpu_ebpf.ledger.compute_maps import Key, TurnCounts
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.linux import futex, threads
from fgpu_ebpf.scheduling import fair_queue, nested_shares
from fgpu_ebpf.scheduling.counters import BUCKETS_NS
from fgpu_ebpf.scheduling.fair_queue import Share
from fgpu_ebpf.scheduling.reports import Seen
from fgpu_ebpf.scheduling.state import NEVER_NS, Place
from fgpu_ebpf.scheduling.turns import MS, Turns

SHARES_NS, PUBLISH_NS, AGAIN_NS = 100 * MS, 500 * MS, 10 * MS
CROWD_LOOK_NS = 5 * MS  # period at which the pages of processes without a watched futex are read
MOST_WAKEUPS = 100  # in SHARES_NS; the futex of a process that causes more wake-ups is not watched
QUANTUM_PARTS = 4  # a quarter of a quantum may be in flight, at most abi.BUDGET_NS


class TimeSlicer:
    """The processes of all tenants with a share, and the thread. All public methods are safe to call in any thread."""

    def __init__(self) -> None:
        self.ledger: Ledger | None = None
        self.is_told = False  # shares_changed() is called after each change; if False, shares are read every SHARES_NS
        self._lock = _thread.allocate_lock()
        self._turns = Turns()
        self._gates: dict[int, list[ProcessGates]] = {}  # by tenant: the level that has the share
        self._by_session: dict[int, tuple[int, ProcessGates]] = {}  # by the session's id(): tenant and gates
        self._without: dict[int, Session] = {}  # sessions without a share so far
        self._shares: dict[int, dict[int, Share]] = {}  # by level and device
        self._gated: dict[int, frozenset[int]] = {}  # by tenant: devices of its own and enclosing shares
        self._used: dict[int, frozenset[int]] = {}  # by tenant: devices that its processes use
        self._epoch, self._read_ns, self._is_read_owed = -1, 0, False  # shares: epoch, last reading, reading due
        self._shares_ns = self._publish_ns = NEVER_NS
        self._measured: tuple[int, dict[Key, int]] = (0, {})
        self._shown: dict[int, frozenset[int]] = {}  # by tenant: devices of the last published rows
        self._unit_rows = UnitRows()
        self._wanted: set[int] = set()
        self._words = futex.FutexWords()
        self._watched: list[ProcessGates] = []
        self._unwatched: list[ProcessGates] = []
        self._ignored: set[int] = set()  # tenants whose futexes are ignored
        self._to_look_at: set[int] = set()  # tenants to be examined, because of a wake-up or a change
        self._is_watching = self._started = self._ended = False
        self._errors = 0

    def use(self, ledger: Ledger) -> None:
        """Use the ledger. Clear the current figures that an earlier gatekeeper has published; counters stay."""
        self.ledger = ledger
        for key in ledger.times.shares():
            if row := ledger.times.turn(*key):
                ledger.times.set_turns(*key, replace(row, owner=0, had_millionths=0, entitled_millionths=0, since_ns=0))

    # -- registration and exit of processes

    def register(self, session: Session) -> None:
        """Add a session, or use its new pages. The gates are set before the process receives the pages."""
        if session.status is None or self.ledger is None:
            return
        with self._lock:
            before = self._epoch
            self._read_shares(self.ledger)
            tenant, gates = self._by_session.pop(id(session), (0, None))
            if gates:
                self._take_out(tenant, gates)
                gates.use_pages_of(session)
            self._add(session, gates)
            looks_no_more = not self.is_told and self._shares_ns == NEVER_NS
            if looks_no_more:
                self._look_at_shares_later()
            others = self._epoch != before if self._started else self._by_session
            if looks_no_more or others or id(session) in self._by_session:
                self._start()

    def shares_changed(self) -> None:
        """Schedule a reading of changed shares, SHARES_NS after the last reading at the earliest.

        The minimum is needed because a tenant can change its cgroups at any rate, and reading all shares takes
        milliseconds if a tenant has hundreds of cgroups.
        """
        with self._lock:
            has_sessions = self._by_session or self._without
            if self.ledger and has_sessions and self.ledger.times.epoch() != self._epoch:
                self._shares_ns = min(self._shares_ns, self._read_ns + SHARES_NS)
                self._is_read_owed = True
                self._start()

    def remove(self, session: Session) -> int:
        """Remove a session from all turns. Return the reported end of its work in flight; 0: no reported work."""
        with self._lock:
            self._without.pop(id(session), None)
            tenant, gates = self._by_session.pop(id(session), (0, None))
            if not gates:
                return 0
            now_ns, until_ns = monotonic_ns(), gates.busy_until_ns()
            if until_ns > now_ns:
                self._turns.lose(tenant, now_ns)
            self._take_out(tenant, gates)
            return until_ns

    def _take_out(self, tenant: int, gates: ProcessGates) -> None:
        self._gates[tenant].remove(gates)
        self._used.pop(tenant, None)  # no other process of the tenant may use these devices
        self._to_look_at.add(tenant)
        self._is_watching = False
        self._words.wake()

    def _start(self) -> None:
        if not self._started:
            threads.start(self._serve)
            self._started = True
        self._words.wake()

    def _add(self, session: Session, gates: ProcessGates | None = None) -> None:
        levels = [level for level in session.levels if level in self._shares]
        if not levels:
            if gates:
                gates.open_all()
            self._without[id(session)] = session  # its page was made with open gates
            return
        tenant, *around = levels
        self._turns.nest(tenant, around, monotonic_ns())
        gates = gates or ProcessGates(session)
        gates.last_value = -1
        gated = self._gated[tenant] = frozenset().union(*(self._shares[level] for level in levels))
        gates.set_shared(gated)
        self._without.pop(id(session), None)
        self._by_session[id(session)] = tenant, gates
        self._gates.setdefault(tenant, []).append(gates)
        self._is_watching = False
        self._to_look_at.add(tenant)
        self._publish_ns = min(self._publish_ns, monotonic_ns() + PUBLISH_NS)
        place = self._turns.places[tenant]
        for device in gated:
            gates.set_budget(device, min(abi.BUDGET_NS, place.share.quantum_ns // QUANTUM_PARTS))
            gates.put(device, place.gate(device))
        gates.open_all(but=gated)

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
        self._shares, self._read_ns = found, monotonic_ns()
        shares = {level: by[min(by)] for level, by in found.items()}
        self._turns.share_out(shares, monotonic_ns(), ledger.times.concurrent())
        with_gates = [*((gates.session, gates) for _, gates in self._by_session.values())]
        self._to_look_at |= self._gates.keys()
        self._gates, self._by_session, self._gated, self._used = {}, {}, {}, {}
        for session, gates in with_gates:
            self._add(session, gates)
        for session in [*self._without.values()]:
            self._add(session)
        self._epoch, self._is_read_owed = epoch, False  # after an error, the shares are read again

    # -- the thread

    def _serve(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread has the handlers
        due_ns = 0
        try:
            while not self._ended:
                self._words.wait(due_ns if due_ns < NEVER_NS else None)
                with self._lock:
                    self._words.clear()
                    due_ns = self._try()
        except BaseException:
            traceback.print_exc()
            os._exit(os.EX_SOFTWARE)  # a failure, so systemd restarts the service; the kernel keeps the ledger

    def _try(self) -> int:
        try:
            return self._turn()
        except OSError:
            self._errors += 1
            return monotonic_ns() + AGAIN_NS

    def _turn(self) -> int:
        """Do the steps that are due. Return the time of the next step, in nanoseconds of CLOCK_MONOTONIC."""
        now_ns = monotonic_ns()
        if self.ledger and now_ns >= self._shares_ns:
            self._shares_ns = now_ns + SHARES_NS
            self._read_shares(self.ledger)
            if not self._forgive() and (self.is_told or not (self._by_session or self._without)):
                self._shares_ns = NEVER_NS
        if self._gates or self._to_look_at:
            self._step()
        if self.ledger and now_ns >= self._publish_ns:
            self._publish(self.ledger, now_ns)
        now_ns = monotonic_ns()
        due_ns = min(self._turns.due_ns(now_ns), self._publish_ns)
        if not self.is_told or self._is_read_owed:
            due_ns = min(due_ns, self._shares_ns)  # otherwise shares are read when another step is due
        return min(due_ns, now_ns + CROWD_LOOK_NS) if self._unwatched else due_ns

    def _forgive(self) -> bool:
        """Reset the counts of wake-ups. Return True if a process has woken the thread."""
        wakeups = [gates.wakeups for _, gates in self._by_session.values()]
        self._is_watching &= max(wakeups, default=0) <= MOST_WAKEUPS
        for _, gates in self._by_session.values():
            gates.wakeups = 0
        return any(wakeups)

    def _step(self) -> None:
        self._listen()
        is_new, is_other = True, False
        while is_new:
            self._to_look_at.update(self._turns.in_question())
            now_ns, observations = monotonic_ns(), dict[int, Seen]()
            for tenant in self._to_look_at:
                if self._gates.get(tenant):
                    self._try_to_look(tenant, observations)
                else:
                    self._turns.leave(tenant, now_ns)
                    self._gates.pop(tenant, None)
                    self._used.pop(tenant, None)
            self._to_look_at.clear()
            changed = self._turns.step(observations, now_ns)
            for tenant in sorted(changed, key=self._is_open):  # close gates before opening other gates
                self._set_gates(tenant)
            is_other |= bool(changed) or len(observations) > 1  # other tenants may wait now
            is_new = self._turns.look_again()
            if is_new:
                futex.fence()  # if a process still reports nothing in flight, its next launch reads the closed gate
        for tenant in self._turns.to_meet(monotonic_ns()):
            let_gang_through(self._gates.get(tenant, ()), monotonic_ns())
        if not self._is_watching:
            self._watch()
            is_other = True
        if is_other:
            self._ignore_words()

    def _listen(self) -> None:
        for place, gates in enumerate(self._watched):
            if gates.has_changed():
                self._words.expect(place, gates.last_value)
                self._is_watching &= gates.wakeups <= MOST_WAKEUPS
                self._mark(gates)
        for gates in self._unwatched:
            if gates.has_changed():
                self._mark(gates)

    def _mark(self, gates: ProcessGates) -> None:
        self._look_at_shares_later()  # the same step checks which processes cause too many wake-ups
        entry = self._by_session.get(id(gates.session))
        if entry:
            self._to_look_at.add(entry[0])

    def _watch(self) -> None:
        all_gates = [gates for _, gates in self._by_session.values()]
        quiet = [gates for gates in all_gates if gates.wakeups <= MOST_WAKEUPS]
        numbers: dict[int, itertools.count[int]] = {}  # first the first process of each workload, then the second ones
        quiet.sort(key=lambda gates: next(numbers.setdefault(gates.session.owner, itertools.count())))
        self._watched = quiet[: futex.MOST_WORDS]
        self._unwatched = quiet[futex.MOST_WORDS :] + [gates for gates in all_gates if gates.wakeups > MOST_WAKEUPS]
        self._words.watch([gates.address for gates in self._watched])
        for place, gates in enumerate(self._watched):
            gates.place = place
            self._words.expect(place, max(0, gates.last_value))
        for gates in self._unwatched:
            gates.place = -1
        self._ignored, self._is_watching = set(), True

    def _ignore_words(self) -> None:
        """Ignore the futexes of tenants whose wake-ups can wait for the next step."""
        before, self._ignored = self._ignored, self._turns.without_wakeups()
        for tenant in before ^ self._ignored:
            for gates in self._gates.get(tenant, ()):
                if gates.place >= 0:
                    self._words.ignore(gates.place, tenant in self._ignored)

    def _try_to_look(self, tenant: int, observations: dict[int, Seen]) -> None:
        try:
            observations[tenant] = self._look(tenant)
        except OSError:
            raise  # an error of the ledger: _try() repeats the step
        except Exception:  # a defect that one tenant triggers must not stop the scheduling of other tenants
            self._turns.resets += 1
            self._turns.forget(tenant)

    def _look(self, tenant: int) -> Seen:
        all_gates, place, used = self._gates[tenant], self._turns.places[tenant], self._used.get(tenant)
        for gates in all_gates:
            if gates.has_begun_to_use():
                gates.use(self._contexts(gates.session.pid))
                used = None
        if used is None:
            used = self._used[tenant] = frozenset().union(*(gates.used for gates in all_gates))
        since_ns = place.turn.opened_ns if place.turn else 0
        seen = observe_processes(all_gates, used, place.number, since_ns, monotonic_ns())
        if seen.waiting or place.turn:
            self._wanted.add(tenant)
        return seen

    def _contexts(self, pid: int) -> set[int]:
        process = self.ledger.process(pid) if self.ledger else None
        return {device for device, count in enumerate(process.contexts) if count} if process else set()

    def _is_open(self, tenant: int) -> bool:
        return self._turns.places[tenant].is_open()

    def _set_gates(self, tenant: int) -> None:
        all_gates = self._gates.get(tenant)
        for device in self._gated.get(tenant, ()) if all_gates else ():
            word = self._turns.places[tenant].gate(device)
            for gates in all_gates or ():
                gates.put(device, word)

    # -- publishing

    def _publish(self, ledger: Ledger, now_ns: int) -> None:
        """Write the `turns` map: counters, and the parts of the time since the last call that tenants had.

        A row also has the part to which the tenant was entitled.
        """
        since_ns, owned = self._measured
        places = {t: self._turns.places[t] for t in {*self._gates, *self._shown} & set(self._turns.places)}
        self._publish_ns = now_ns + PUBLISH_NS if self._gates else NEVER_NS
        self._measured = now_ns, {(t, d): one.owned_ns for t in self._gates for d, one in places[t].counts.items()}
        wanted, self._wanted = self._wanted & set(places), set()
        rows, due = dict[Key, TurnCounts](), dict[int, int]()
        parts: dict[tuple[object, ...], int] = {}  # what tenants with the same share, group and rivals are entitled to
        for tenant, place in sorted(places.items(), key=lambda one: one[1].is_unit()):
            self._observe(tenant, place, ledger, now_ns)
            same = (place.share, place.above[-1:], place.seen.devices, tenant in wanted)
            if same not in parts:
                near = {t for t in wanted if places[t].seen.devices & place.seen.devices} | {tenant}
                tops = {t: places[t].above[-1] for t in near if places[t].above}
                parts[same] = nested_shares.entitled({t: places[t].share for t in near}, tops)[tenant]
            due[tenant] = parts[same]
            shown = self._shown.get(tenant, frozenset())  # one last row after the tenant has left a device
            for device in self._own_devices(place) | shown:
                owned_ns = place.counts[device].owned_ns
                had_ns = max(0, owned_ns - owned.get((tenant, device), owned_ns))  # a new state begins at 0
                part = had_ns * fair_queue.MILLION // max(1, now_ns - since_ns) if since_ns else 0
                rows[tenant, device] = counts_of(place, device, part, parts[same])
        span_ns = now_ns - since_ns if since_ns else 0
        units = self._unit_rows.over(rows, places, due, wanted, self._shares, span_ns, self._turns.places)
        for key, row in (rows | units).items():
            ledger.times.set_turns(*key, row)
        self._shown = {tenant: self._own_devices(places[tenant]) for tenant in self._gates}

    def _own_devices(self, place: Place) -> frozenset[int]:
        """Return the used devices on which the tenant has a share of its own, not only a group's share."""
        return place.seen.devices.intersection(self._shares.get(place.tenant, ()))

    def _observe(self, tenant: int, place: Place, ledger: Ledger, now_ns: int) -> None:
        for device in place.seen.devices:
            if (ran_ns := ledger.times.ran_ns(tenant, device)) is not None:
                self._turns.observed(tenant, device, ran_ns, now_ns)

    def counts(self) -> dict[str, Any]:
        """Return the counters of every device, in types that JSON can represent."""
        with self._lock:
            return {
                "bounds_ns": list(BUCKETS_NS),
                "devices": {str(device): asdict(counts) for device, counts in self._turns.devices.items()},
                "errors": self._errors,
                "faults": self._turns.resets,
            }

    def end(self) -> None:
        """Open every gate, and stop scheduling."""
        with self._lock:
            self._ended = True
            for _, gates in self._by_session.values():
                gates.open_all()
            self._words.wake()
