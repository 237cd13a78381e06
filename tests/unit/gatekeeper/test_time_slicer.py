"""Tests of the time slicer with real pages, futexes and time. The programs are threads that write status pages."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from types import SimpleNamespace

import pytest

from fgpu_ebpf.abi import DEVICES, Gate
from fgpu_ebpf.gatekeeper import time_slicer
from fgpu_ebpf.gatekeeper.memfd_pages import ControlMemory, StatusMemory
from fgpu_ebpf.gatekeeper.time_slicer import TimeSlicer
from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.linux import futex
from fgpu_ebpf.scheduling.fair_queue import Share
from tests.support.wait import Deadline

pytestmark = pytest.mark.timed

PLENTY_SECONDS = 2.0


class Ledger:
    """Shares by level, on device 0, and the contexts of every process."""

    def __init__(self, **shares):
        self.told, self.version, self.ran = {}, 1, {}
        self.given = {(int(level[1:]), 0): share for level, share in shares.items()}
        self.times = self

    def epoch(self):
        return self.version

    def shares(self):
        return self.given

    def concurrent(self):
        return frozenset()

    def set_turns(self, level, device, counts):
        self.told[level, device] = counts

    def ran_ns(self, level, device):
        return self.ran.get((level, device))

    def process(self, pid):
        return SimpleNamespace(contexts=[1])


class Program:
    """A process that, once started, always has something to launch."""

    def __init__(self, pid, *levels, owner=7):
        control = ControlMemory()
        status = StatusMemory()
        self.client = SimpleNamespace(pid=pid, owner=owner, levels=levels, control=control, status=status, ahead_ns=0)
        control.page.gates[:] = [1] * DEVICES
        self.page, self.status = control.page, status.page
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def word(self):
        return self.page.gates[0]

    def is_open(self, device=0):
        return bool(self.page.gates[device] & Gate.OPEN)

    def ring(self):
        self.status.bell += 1
        futex.wake(ctypes.addressof(self.status) + type(self.status).bell.offset)

    def _run(self):
        mine = self.status.devices[0]
        while not self.ended.is_set():
            if self.is_open():
                mine.waiting = 0
                mine.launches += 1
            elif not mine.waiting or mine.drained != self.word() >> 2:
                mine.drained, mine.waiting = self.word() >> 2, 1
                self.ring()
            time.sleep(0.0005)


class World:
    def __init__(self, ledger):
        self.slicer = TimeSlicer()
        self.slicer.ledger = ledger
        self.programs = []
        self.turns = 0
        turn = self.slicer._turn

        def counted():
            self.turns += 1
            return turn()

        self.slicer._turn = counted

    def greet(self, pid, *levels, owner=7, start=True):
        program = Program(pid, *levels, owner=owner)
        self.programs.append(program)
        self.slicer.register(program.client)
        if start:
            program.thread.start()
        return program

    def until(self, holds, seconds=PLENTY_SECONDS):
        deadline = Deadline(seconds)
        while not holds():
            assert not deadline.is_over(), "not in time"
            time.sleep(0.0005)

    def run(self, seconds, each=lambda: None):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.0005)
            each()


@pytest.fixture
def world():
    made = []

    def make(**shares):
        made.append(World(Ledger(**shares)))
        return made[-1]

    yield make
    programs = [program for one in made for program in one.programs]
    for one in made:
        one.slicer.end()
    for program in programs:
        program.ended.set()
    for program in programs:  # select() of later tests in this process takes no descriptor above 1023
        if program.thread.is_alive():
            program.thread.join()
        program.page = program.status = None
        program.client.control.close()
        program.client.status.close()


def test_a_gate_without_a_share_is_open_and_the_slicer_only_polls_shares(world):
    it, begun = world(t7=Share()), time.monotonic()
    program = it.greet(1, 8, start=False)
    assert program.word() == Gate.OPEN
    it.run(1.0)
    turns = it.turns
    assert turns <= 10 * (time.monotonic() - begun) + 2  # for the poll of shares


def test_a_slicer_that_is_notified_of_shares_does_not_poll(world):
    it = world(t7=Share(limit_millionths=500_000))
    it.slicer.is_told = True
    programs = [it.greet(1, 8, start=False), it.greet(2, 8, start=False)]
    it.run(1.0)
    assert it.turns == 0
    it.slicer.ledger.given, it.slicer.ledger.version = {(8, 0): Share(limit_millionths=500_000)}, 2
    it.slicer.shares_changed()
    it.until(lambda: all(p.word() & Gate.GATED for p in programs))
    before, begun = it.turns, time.monotonic()
    it.run(1.0)
    turns = it.turns - before
    assert turns <= 2 * (time.monotonic() - begun) + 3  # for the publication of counts
    it.slicer.ledger.given, it.slicer.ledger.version = {}, 3
    late = it.greet(3, 8, start=False)  # the slicer has no entry of this program yet
    it.until(lambda: all(p.word() == Gate.OPEN for p in (*programs, late)))


def test_continuously_changing_shares_are_read_at_intervals(world):
    """A tenant creates a cgroup with a share every 2 ms, for example. The last change still takes effect."""
    it = world(t7=Share())
    it.slicer.is_told = True
    program, ledger, reads = it.greet(1, 7, start=False), it.slicer.ledger, []
    ledger.shares = lambda: reads.append(1) or ledger.given
    begun = time.monotonic()
    for number in range(100):
        ledger.given, ledger.version = {**ledger.given, (100 + number, 0): Share()}, ledger.version + 1
        it.slicer.shares_changed()
        time.sleep(0.002)
    ledger.given, ledger.version = {}, ledger.version + 1
    it.slicer.shares_changed()
    it.until(lambda: len(it.slicer._shares) == 0, 0.2)
    number = len(reads)
    assert 1 < number <= 3 + (time.monotonic() - begun) / 0.1
    assert program.word() == Gate.OPEN


def test_a_notification_without_a_change_wakes_no_thread(world):
    it = world(t7=Share(limit_millionths=500_000))
    it.slicer.is_told = True
    it.slicer.shares_changed()
    it.greet(1, 8, start=False)
    for _ in range(100):
        it.slicer.shares_changed()
    it.run(0.2)
    assert it.turns == 0


def test_a_process_that_stops_waking_too_often_is_watched_again(world):
    it = world(t7=Share(limit_millionths=500_000))
    it.slicer.is_told = True
    program = it.greet(1, 7, start=False)
    it.until(lambda: it.slicer._is_watching)
    while not it.slicer._unwatched:
        program.ring()
    it.until(lambda: not it.slicer._unwatched and it.slicer._watched)


def test_a_workload_with_many_processes_takes_no_watched_word_from_another_workload(world):
    it = world(t7=Share(limit_millionths=500_000))
    it.slicer.is_told = True
    many = [it.greet(pid, 7, start=False) for pid in range(1, futex.MOST_WORDS + 5)]
    others = [it.greet(pid, 7, owner=8, start=False) for pid in (1001, 1002)]
    it.until(lambda: it.slicer._is_watching and len(it.slicer._by_session) == len(many) + len(others))
    watched = {gates.session.pid for gates in it.slicer._watched}
    assert len(watched) == futex.MOST_WORDS
    assert {1, 1001, 1002} <= watched


def test_a_gate_is_closed_before_its_first_read_and_opens_for_a_waiting_thread(world):
    it = world(t7=Share(limit_millionths=500_000))
    program = it.greet(1, 7, start=False)
    assert program.word() == Gate.GATED
    it.run(0.05)
    assert not program.is_open()
    program.thread.start()
    it.until(program.is_open)
    assert program.word() & Gate.GATED


def test_a_lone_tenant_without_a_ceiling_has_an_open_gate(world):
    it = world(t7=Share())
    program = it.greet(1, 7)
    it.until(lambda: program.word() == Gate.OPEN)


def test_nvml_s_figures_are_the_least_charge_of_a_tenant_with_a_ceiling(world):
    it = world(t7=Share(limit_millionths=500_000))
    it.greet(1, 7)
    told, ran = it.slicer.ledger.told, it.slicer.ledger.ran
    it.until(lambda: (7, 0) in told)
    ran[7, 0] = 0
    read, it.slicer.ledger.ran_ns = [], lambda *of: read.append(of) or ran.get(of)
    it.until(lambda: len(read) > 1)  # a publication with the first figure has ended
    before, ran[7, 0] = told[7, 0].owned_ns, 60 * 10**9
    it.until(lambda: told[7, 0].owned_ns - before > 10**9)  # MOST_BETWEEN_NS less the tolerance


def test_tenants_own_the_device_one_at_a_time(world):
    it = world(t7=Share(), t8=Share())
    programs = [it.greet(1, 7), it.greet(2, 8)]
    it.until(lambda: all(p.word() & Gate.GATED for p in programs))
    both, turns = [], set()

    def look():
        words = [p.word() for p in programs]
        if words == [p.word() for p in programs]:  # no turn has ended meanwhile
            both.append(all(word & Gate.OPEN for word in words))
            turns.update(word >> 2 for word in words)

    it.run(1.0, look)
    it.until(lambda: look() or len(turns) > 10)
    assert not any(both)
    counts = it.slicer.ledger.told
    it.until(lambda: {key: count.waits > 3 for key, count in list(counts.items())} == {(7, 0): True, (8, 0): True})
    assert counts[7, 0].entitled_millionths == pytest.approx(500_000, abs=1)


def test_another_tenant_continues_when_an_owner_ends(world):
    it = world(t7=Share(quantum_ns=1_000_000_000), t8=Share(quantum_ns=1_000_000_000))
    programs = [it.greet(1, 7), it.greet(2, 8)]
    it.until(lambda: sum(p.is_open() for p in programs) == 1 and all(p.word() & Gate.GATED for p in programs))
    owner, other = sorted(programs, key=lambda p: not p.is_open())
    owner.ended.set()
    owner.thread.join()
    it.slicer.remove(owner.client)
    it.until(other.is_open, 0.3)  # far less than a quantum


def test_an_exit_with_work_in_flight_is_reported_to_the_turns(world):
    """Another process of the tenant continues, and has nothing in flight."""
    it = world(t7=Share(), t8=Share())
    liar, sibling = it.greet(1, 7, start=False), it.greet(2, 7, start=False)
    it.greet(3, 8)
    place = it.slicer._turns.places[7]
    sibling.status.devices[0].launches = 1
    sibling.ring()
    flight = liar.status.flights[0]
    flight.in_flight, flight.busy_until_ns, liar.status.devices[0].waiting = 1, 2**62, 1
    liar.ring()
    it.until(lambda: place.turn and 0 < place.turn.closing_ns < time.monotonic_ns() - 20_000_000)
    it.slicer.remove(liar.client)
    it.until(lambda: place.turn is None)
    it.run(0.1)
    assert place.trust.standing.pace_ns
    assert not place.trust.standing.proven


@pytest.mark.parametrize("to", [None, 8, 9])
def test_a_device_that_only_an_ended_or_moved_process_used_is_free_for_the_remaining_tenant(world, to):
    """Such a process no longer counts as a user of a device. So each tenant is alone on a device, without turns."""
    it = world(t7=Share(), t8=Share())
    ledger = it.slicer.ledger
    ledger.given = {(level, device): Share() for level, _ in ledger.given for device in (0, 1)}
    ledger.process = lambda pid: SimpleNamespace(contexts=[int(pid == 1), int(pid > 1)])
    first, second, other = it.greet(1, 7, start=False), it.greet(2, 7, start=False), it.greet(3, 8, start=False)
    for program, device in ((first, 0), (second, 1), (other, 1)):
        program.status.devices[device].waiting = 1
        program.ring()
    places = it.slicer._turns.places
    it.until(lambda: (places[7].seen.devices, places[8].seen.devices) == ({0, 1}, {1}))
    if to is None:
        it.slicer.remove(second.client)
    else:  # a tenant with a share, or a cgroup without a share
        second.client.levels = (to,)
        it.slicer.register(second.client)
    it.until(lambda: (places[7].free_on, places[8].free_on) == ({0}, {1}))


def test_the_counts_of_a_unit_include_the_time_of_all_inside_it(world):
    it = world(t5=Share(), t7=Share(), t8=Share(weight=300), t9=Share())
    programs = [it.greet(1, 7, 9), it.greet(2, 8, 9), it.greet(3, 5)]
    told = it.slicer.ledger.told
    it.until(lambda: all((level, 0) in told and told[level, 0].had_millionths for level in (5, 7, 8, 9)))
    it.run(1.2)

    def read():
        return {level: told[level, 0] for level in (5, 7, 8, 9)}

    found = {}

    def is_whole():
        """Read twice, since a publication in the middle of a reading changes only some of the counts."""
        found.update(read())
        time.sleep(0.05)
        return found == read()

    it.until(is_whole)
    assert found[9].owned_ns == found[7].owned_ns + found[8].owned_ns
    assert found[9].had_millionths == pytest.approx(found[7].had_millionths + found[8].had_millionths, abs=3)
    assert found[9].entitled_millionths == pytest.approx(500_000, abs=3)
    assert not found[9].free
    for program in programs[:2]:
        program.ended.set()
        program.thread.join()
        it.slicer.remove(program.client)
    it.until(lambda: not told[9, 0].owner and not told[9, 0].had_millionths)
    assert told[9, 0].owned_ns >= found[9].owned_ns


def test_an_inner_share_of_one_device_keeps_the_gates_of_both_devices(world):
    """A tenant's cgroup with a share of one device must not remove the ceiling of the other device."""
    it, outer = world(t7=Share()), Share(limit_millionths=10_000)
    ledger = it.slicer.ledger
    ledger.given = {(7, 0): Share(), (9, 0): outer, (9, 1): outer}
    ledger.process = lambda pid: SimpleNamespace(contexts=[0, 1])
    program = it.greet(1, 7, 9, start=False)
    words = program.page.gates
    assert [word & Gate.GATED for word in words[:3]] == [Gate.GATED, Gate.GATED, 0]
    program.status.devices[1].waiting = 1
    program.ring()
    it.until(lambda: words[1] & Gate.OPEN)
    program.status.devices[1].waiting, program.status.devices[1].launches = 0, 1
    program.status.flights[1].in_flight, program.status.flights[1].busy_until_ns = 1, 2**62
    it.until(lambda: not words[1] & Gate.OPEN)  # its ceiling is that of the outer level
    it.run(0.6)  # until the publication
    assert not {key for key in ledger.told if key not in ledger.given}


@pytest.mark.parametrize("share", [Share(), Share(limit_millionths=500_000)])
def test_counters_of_a_tenant_without_programs_stay_and_its_current_figures_are_zero(world, share):
    it = world(t7=share)
    program, told = it.greet(1, 7), it.slicer.ledger.told
    it.until(lambda: (7, 0) in told and (told[7, 0].owned_ns or told[7, 0].free))
    program.ended.set()
    program.thread.join()
    it.slicer.remove(program.client)
    place = it.slicer._turns.places[7]
    it.until(lambda: not it.slicer._shown)  # its last row is published
    last = told[7, 0]
    assert (last.owned_ns, last.waits) == (place.counts[0].owned_ns, place.counts[0].waits)
    assert (last.owner, last.had_millionths, last.free, last.since_ns) == (0, 0, 0, 0)


def test_removing_a_share_opens_the_gates_of_running_programs(world):
    it = world(t7=Share(limit_millionths=10_000))
    program = it.greet(1, 7)
    it.until(lambda: program.word() & Gate.GATED)
    it.slicer.ledger.given, it.slicer.ledger.version = {}, 2
    it.until(lambda: program.word() == Gate.OPEN, 0.2)


def test_the_end_of_the_slicer_opens_every_gate(world):
    it = world(t7=Share(limit_millionths=10_000))
    program = it.greet(1, 7, start=False)
    it.slicer.end()
    assert program.word() == Gate.OPEN


def test_a_ledger_that_cannot_be_read_is_read_again(world):
    it = world(t7=Share(), t8=Share())
    programs = [it.greet(1, 7), it.greet(2, 8)]
    it.until(lambda: all(p.word() & Gate.GATED for p in programs))
    epoch, it.slicer.ledger.epoch = it.slicer.ledger.epoch, lambda: os.stat("/nowhere")
    it.until(lambda: it.slicer.counts()["errors"] > 0)
    it.slicer.ledger.epoch = epoch
    word = programs[0].word()
    it.until(lambda: programs[0].word() >> 2 > (word >> 2) + 2)


def test_processes_get_their_gates_after_a_page_could_not_be_mapped(world, monkeypatch):
    it = world()
    programs = [it.greet(n, n, start=False) for n in (7, 8, 9)]
    made, failed = time_slicer.ProcessGates, []

    def gates(session):
        if not failed:
            failed.append(session)
            raise OSError("no memory")
        return made(session)

    monkeypatch.setattr(time_slicer, "ProcessGates", gates)
    ledger = it.slicer.ledger
    ledger.given, ledger.version = {(n, 0): Share() for n in (7, 8, 9)}, 2
    it.until(lambda: all(p.word() & Gate.GATED for p in programs))
    assert failed


def test_a_thread_that_could_not_be_started_is_started_at_the_next_registration(world, no_thread_once):
    it = world(t7=Share(), t8=Share())
    with pytest.raises(OSError, match="can't start new thread"):
        it.greet(1, 7)
    programs = [it.programs[0], it.greet(2, 8)]
    programs[0].thread.start()
    it.until(lambda: all(p.status.devices[0].launches for p in programs))


def test_a_thread_that_could_not_be_started_for_new_shares_is_started_at_any_later_registration(world, no_thread_once):
    """The gates of registered programs are closed already, and only the thread opens them."""
    it = world()
    it.slicer.is_told = True
    it.greet(1, 7, start=False)
    ledger = it.slicer.ledger
    ledger.given, ledger.version = {(7, 0): Share(), (8, 0): Share()}, 2
    with pytest.raises(OSError, match="can't start new thread"):
        it.greet(2, 9, start=False)
    assert not it.slicer._started
    it.greet(3, 9, start=False)
    assert it.slicer._started


@pytest.mark.parametrize("part", ["_look", "_turns._look"])
def test_an_internal_error_for_one_tenant_does_not_stop_the_others(world, monkeypatch, part):
    it = world(t7=Share(), t8=Share(), t9=Share())
    programs = [it.greet(1, 7), it.greet(2, 8), it.greet(3, 9)]
    it.until(lambda: all(p.word() & Gate.GATED for p in programs))
    owner, name = (it.slicer._turns, "_look") if "." in part else (it.slicer, "_look")
    real = getattr(owner, name)

    def look(place, *more):
        if getattr(place, "tenant", place) == 7:
            raise OverflowError("a number that is out of range")
        return real(place, *more)

    monkeypatch.setattr(owner, name, look)
    programs[0].ring()
    it.until(lambda: it.slicer.counts()["faults"])
    for program in programs[1:]:
        number = program.word() >> 2
        it.until(lambda program=program, number=number: program.word() >> 2 > number + 2)
    assert not programs[0].is_open(), "the gate of the tenant with the error is open"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_internal_error_of_the_slicer_ends_the_process(world, monkeypatch):
    it, ended = world(t7=Share()), []
    monkeypatch.setattr(os, "_exit", ended.append)
    it.greet(1, 7)
    it.slicer.ledger.version = "no number"
    it.slicer.ledger.given = None
    it.until(lambda: ended)
    time.sleep(0.1)  # until the slicer has written its last report
    assert ended == [os.EX_SOFTWARE]


def test_a_process_that_rings_without_end_causes_fewer_than_2000_rounds_in_a_second(world):
    it = world(t7=Share(limit_millionths=500_000))
    program = it.greet(1, 7, start=False)
    stop = time.monotonic() + 1.0

    def ring():
        while time.monotonic() < stop:
            program.ring()

    threading.Thread(target=ring, daemon=True).start()
    it.run(1.0)
    assert it.turns < 2_000


def test_an_ignored_word_wakes_no_thread():
    words, futexes = (ctypes.c_uint32 * 2)(), futex.FutexWords()
    addresses = [ctypes.addressof(words) + 4 * place for place in (0, 1)]
    futexes.watch(addresses)

    def wakes(place):
        waiter = threading.Thread(target=futexes.wait, args=(time.monotonic_ns() + 10 * 10**9,), daemon=True)
        waiter.start()
        deadline = Deadline(0.3)
        while waiter.is_alive() and not deadline.is_over():
            futex.wake(addresses[place])
            time.sleep(0.001)
        woken = not waiter.is_alive()
        while waiter.is_alive():
            futex.wake(addresses[1])
        return woken

    assert wakes(0)
    futexes.ignore(0, True)
    assert not wakes(0)
    assert wakes(1)
    futexes.ignore(0, False)
    assert wakes(0)


def test_a_tenant_that_waits_for_an_owner_does_not_wake_the_slicer(world):
    """Only the owner is checked, at most once in 1.75 ms.

    An owner without a processor seems idle, and the other tenant gets the device. The test discards such rounds.
    """
    long = Share(quantum_ns=1_000_000_000)
    it = world(t7=long, t8=long)
    it.slicer.is_told = True
    programs = [it.greet(1, 7), it.greet(2, 8)]
    rings = looks = seconds = 0
    while rings < 300:
        it.until(lambda: sum(p.is_open() for p in programs) == 1 and it.slicer._ignored)
        waiting = [p for p in programs if p.status.devices[0].waiting and not p.is_open()]
        words, turns, began = [p.word() for p in programs], it.turns, time.monotonic()
        for _ in range(20):
            for program in waiting:
                program.ring()
            time.sleep(0.001)
        if len(waiting) == 1 and [p.word() for p in programs] == words:
            rings, looks, seconds = rings + 20, looks + it.turns - turns, seconds + time.monotonic() - began
    assert looks < 20 + seconds / 0.00175


def test_a_share_removed_and_set_again_is_counted_from_zero():
    """The counts of its new slot begin at 0, below the last reported counts."""
    share = Share(limit_millionths=500_000)
    ledger, slicer = Ledger(L7=share), TimeSlicer()
    slicer.ledger = ledger

    def published(owned_ns):
        ledger.version += 1
        slicer._read_shares(ledger)
        slicer._gates = {7: []}
        place = slicer._turns.places[7]
        place.seen, place.counts[0].owned_ns = place.seen._replace(devices=frozenset({0})), owned_ns
        slicer._publish(ledger, time.monotonic_ns())
        return ledger.told[7, 0].had_millionths

    published(0)
    assert published(10**6) > 0
    ledger.given = {}
    ledger.version += 1
    slicer._read_shares(ledger)
    ledger.given = {(7, 0): share}
    assert published(0) == 0


def test_the_entitlements_of_many_tenants_are_computed_once_for_equal_shares(monkeypatch):
    """Computed for each tenant of a cgroup with 500 inner cgroups, they would keep the gates unchanged for 0.1 s."""
    some = range(1, 41)
    ledger, slicer, calls = Ledger(**{f"L{level}": Share(weight=100 + level % 2) for level in some}), TimeSlicer(), []
    slicer.ledger = ledger
    ledger.version += 1
    slicer._read_shares(ledger)
    slicer._gates = {level: [] for level in some}
    for level in some:
        place = slicer._turns.places[level]
        place.seen = place.seen._replace(devices=frozenset({level % 2}))
    slicer._wanted = {level for level in some if level < 20}
    entitled = time_slicer.nested_shares.entitled
    monkeypatch.setattr(time_slicer.nested_shares, "entitled", lambda *words: calls.append(1) or entitled(*words))
    slicer._publish(ledger, time.monotonic_ns())
    assert len(calls) == 4  # those that want device 0 and 1, and those that don't
    parts = {level: ledger.told[level, 0].entitled_millionths for level in some if (level, 0) in ledger.told}
    assert parts == {level: 1_000_000 // (9 if level < 20 else 10) for level in some if level % 2 == 0}


def test_a_gang_s_missing_launches_proceed_after_its_gates_close(world):
    """The gates close after three launches on one device, before the matching launches on the other."""
    it = world(t7=Share(limit_millionths=500_000))
    ledger = it.slicer.ledger
    ledger.given = {(7, device): Share(limit_millionths=500_000) for device in (0, 1)}
    ledger.process = lambda pid: SimpleNamespace(contexts=[1, 1])
    program = it.greet(1, 7, start=False)
    status, passes = program.status, program.page.passes
    for device in (0, 1):
        status.devices[device].launches = 7
    status.devices[0].waiting = 1
    program.ring()
    it.until(program.is_open)
    status.devices[0].waiting, status.devices[0].launches = 0, 10
    status.flights[0].in_flight, status.flights[0].busy_until_ns = 3, time.monotonic_ns()
    status.devices[1].waiting = 1
    it.until(lambda: passes[1])
    assert not program.is_open()
    assert (passes[0], passes[1]) == (0, 7 + 3)
    for device in (0, 1):  # its turn ends, with no further launches
        status.flights[device].in_flight, status.devices[device].drained = 0, program.word() >> 2
    status.devices[1].launches = 8
    program.ring()
    it.until(lambda: program.is_open(0) and program.is_open(1))
    assert not any(passes)


def published(ledger, devices=(0,)):
    """Return a slicer with a place of tenant 7 on these devices, and a function that publishes its rows."""
    slicer = TimeSlicer()
    slicer.ledger, ledger.version = ledger, ledger.version + 1
    slicer._read_shares(ledger)
    slicer._gates = {level: [] for level, _ in ledger.given}
    place = slicer._turns.places[7]
    place.seen = place.seen._replace(devices=frozenset(devices))
    return slicer, place, lambda: slicer._publish(ledger, time.monotonic_ns())


def test_a_row_of_a_device_that_the_tenant_has_left_has_only_counters():
    ledger = Ledger()
    ledger.given = {(7, 0): Share(), (7, 1): Share()}
    slicer, place, publish = published(ledger, (0, 1))
    place.since_ns, place.counts[0].owned_ns = 5, 9
    publish()
    assert ledger.told[7, 0].since_ns == ledger.told[7, 1].since_ns == 5
    place.seen = place.seen._replace(devices=frozenset({1}))
    slicer._wanted = {7}
    publish()
    left = ledger.told[7, 0]
    assert left.owned_ns == 9
    assert (left.owner, left.had_millionths, left.entitled_millionths, left.free, left.since_ns) == (0,) * 5
    assert ledger.told[7, 1].since_ns == 5


def test_the_first_row_of_a_second_device_has_no_history():
    ledger = Ledger()
    ledger.given = {(7, 0): Share(), (7, 1): Share()}
    _, place, publish = published(ledger)
    place.charge(10**12)
    place.counts[0].wait_ns = place.counts[0].waits = 10**12
    publish()
    place.seen = place.seen._replace(devices=frozenset({0, 1}))
    publish()
    assert ledger.told[7, 0].owned_ns == 10**12
    assert ledger.told[7, 1].owned_ns == ledger.told[7, 1].wait_ns == ledger.told[7, 1].waits == 0


def test_counters_of_a_unit_s_own_programs_stay_after_their_exit():
    ledger = Ledger()
    ledger.given = {(7, 0): Share(), (8, 0): Share()}
    slicer, place, publish = published(ledger)
    slicer._turns.nest(8, [7], time.monotonic_ns())
    inner = slicer._turns.places[8]
    inner.seen, place.counts[0].waits, place.counts[0].wait_ns = place.seen, 3, 50
    publish()
    slicer._gates = {8: []}
    place.seen = place.seen._replace(devices=frozenset())
    for _ in range(3):
        publish()
        assert (ledger.told[7, 0].waits, ledger.told[7, 0].wait_ns) == (3, 50)


def test_rows_of_an_earlier_gatekeeper_keep_only_their_counters():
    ledger = Ledger(t7=Share(), t8=Share())
    ledger.told[7, 0] = TurnCounts(1, 2, 3, 4, 5, 6, 1, 7, 8, 1, 9)
    ledger.turn = lambda *key: ledger.told.get(key)
    TimeSlicer().use(ledger)
    assert ledger.told == {(7, 0): TurnCounts(1, 2, 3, 4, 5, 6, 0, 0, 0, 1, 0)}
