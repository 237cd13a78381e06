"""Tests of the reconciliation with test doubles of the ledger and of NVML, which may answer as no driver does."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf import abi
from fgpu_ebpf.abi import Seen
from fgpu_ebpf.agent.device_balance import CALM_LOOKS
from fgpu_ebpf.agent.ledger_corrections import GONE, overhead_for
from fgpu_ebpf.agent.nvml_reconcile import ORPHAN_PERIODS, PERIOD_SECONDS, Reconciler, _period, check
from fgpu_ebpf.agent.orphan_release import CONTEXT_REST_BYTES, DEVICE_REST_BYTES, SETTLED_NS, SLACK_AFTER_NS, VAIN_NS
from fgpu_ebpf.driver import device_sample
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.process_entry import Process
from tests.support.wait import eventually

MIB = 1 << 20
LEADERLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall(60 if __import__("platform").machine() == "x86_64" else 93, 0)
"""
ME = os.getpid()


def one(bytes_: int) -> tuple[int, ...]:
    return (bytes_, *[0] * 15)


def process(
    charged: int,
    overhead: int = 0,
    managed: int = 0,
    pool: int = 0,
    changes: int = 7,
    quiet: bool = True,
) -> Process:
    return Process(1, (5,), 0, changes, quiet, one(charged), one(overhead), one(managed), one(pool), one(1))


def orphan(bytes_: int, tgid: int = 9, since_ns: int = 1, ended_ns: int = 1) -> Orphan:
    return Orphan(tgid, 0, 3, 0, bytes_, since_ns, ended_ns, (5,))


class Orphans:
    """The map `orphans` with the entries `all` of one level. Another `without` bytes of the level have no entry."""

    def __init__(self) -> None:
        self.all: list[Orphan] = []
        self.kept: dict[tuple[int, int], int] = {}  # by level and device: bytes orphaned before this time are kept
        self.without = self.freed = 0

    def entries(self):
        return list(self.all)

    def let_go(self, orphan, bytes_):
        if orphan not in self.all:
            return False
        self.all.remove(orphan)
        if orphan.bytes > bytes_:
            self.all.append(replace(orphan, bytes=orphan.bytes - bytes_))
        return True

    def levels_with_bytes(self, levels, _pages):
        return [level for level in levels if any(self.of_level(level))]

    def of_level(self, _):
        return list(one(self.without + sum(orphan.bytes for orphan in self.all)))

    def disown(self, _, device, bytes_):
        assert (device, bytes_ <= self.without) == (0, True)
        self.without -= bytes_
        return True

    def managed_freed(self, _):
        return self.freed

    def forget_empty(self, living):
        assert not [o for o in self.all if not o.bytes]

    def looked(self, level, device, since_ns):
        self.kept[level, device] = since_ns

    @property
    def bytes(self):
        return sum(orphan.bytes for orphan in self.all)


class Books:
    """A ledger of one process."""

    def __init__(self, entry: Process) -> None:
        self.entry, self.moved, self.finished, self.refuses = entry, [], [], 0
        self.times = SimpleNamespace(shared=dict, turns=dict)
        self.so_far, self.swept = 1, 0
        self.orphans = Orphans()
        self.marked: list[tuple[int, int]] = []
        self.told: list[str] = []
        self.churn = 0  # bytes that the process allocates and frees between two reads of its entry

    def processes(self):
        return {ME: self.entry}

    def process(self, tgid):
        return self.processes().get(tgid)

    def mark(self, tgid, generation, device):
        self.marked.append((tgid, device))
        self.entry = replace(self.entry, peak=one(self.entry.bytes[0] + self.churn))
        return True

    def overhead(self, tgid, generation, device, bytes_, changes):
        if self.refuses or changes != self.entry.changes:
            self.refuses -= 1
            return False
        self._set(bytes_)
        return True

    def _set(self, overhead):
        more = overhead - self.entry.overhead[0]
        self.entry = replace(self.entry, bytes=one(self.entry.bytes[0] + more), overhead=one(overhead))

    def raise_overhead(self, tgid, generation, device, more):
        self._set(self.entry.overhead[0] + more)
        return True

    def context_seen(self, tgid, generation, device, changes):
        assert (device, self.entry.contexts[0], changes) == (0, 0, self.entry.changes)
        self.told.append("seen")
        self.entry = replace(self.entry, contexts=one(1), unseen=1)
        return True

    def context_gone(self, tgid, generation, device, changes):
        assert (device, self.entry.unseen, changes) == (0, 1, self.entry.changes)
        self.told.append("gone")
        self.entry = replace(self.entry, contexts=one(self.entry.contexts[0] - 1), unseen=0)
        return True

    def move(self, pid, generation, levels):
        self.moved.append((pid, levels))

    def finish_move(self, tgid, generation):
        self.finished.append((tgid, generation))

    def tenants(self):
        return {}

    def processes_so_far(self):
        return self.so_far

    def context_bytes(self, _):
        return 512 * MIB

    def sweep(self):
        self.swept += 1
        return 0

    def reap(self, tgid, generation):
        raise AssertionError("no process has ended")


def reconciler(books: Books, says, in_use=None) -> Reconciler:
    """Return a reconciler. NVML reports these rows, and this many bytes in use."""
    nvml = SimpleNamespace(
        devices=[SimpleNamespace(index=0)],
        used_bytes=lambda _: 1,
        in_mig_mode=lambda _: False,
        process_bytes=lambda _: says() if callable(says) else says,
        process_percent=lambda *_: None,
        taken_bytes=lambda _: in_use() if callable(in_use) else in_use,
        xids=list,
        watched=frozenset,
        look_for_missing=lambda: None,
    )
    return Reconciler(nvml, books, lambda _: (5,))


def test_a_reconciler_that_was_never_started_can_be_stopped():
    """An agent that cannot start therefore shows its own error."""
    Reconciler(SimpleNamespace(devices=[], process_percent=None), Books(process(0)), lambda _: ()).stop()


def test_memory_in_nvml_beyond_the_witnessed_bytes_is_overhead():
    books = Books(process(900 * MIB, 512 * MIB))
    one = reconciler(books, {ME: 1000 * MIB})
    one.look()
    assert books.entry.bytes[0] == 1000 * MIB
    assert books.entry.overhead[0] == 612 * MIB
    assert one.truth.drift == {(ME, 0): 0}


def test_processes_are_those_of_the_ledger_while_nvml_answers_for_no_device(monkeypatch):
    books, rows = Books(process(900 * MIB, 512 * MIB)), None
    one = reconciler(books, lambda: rows)
    one.look()
    assert one.truth.processes == {ME: books.entry}, "NVML has not answered yet"
    rows = {ME: 900 * MIB}
    one.look()
    rows = None
    monkeypatch.setattr(books, "processes", dict)
    one.look()
    assert (one.truth.held, one.truth.processes) == ({}, {})


def test_a_level_may_be_reported_during_a_pass(monkeypatch):
    """The main thread reports the orphaned bytes of a second level while the pass checks the first level."""
    books = Books(process(0))
    books.orphans.without = MIB
    one, checked = reconciler(books, {}, MIB), []
    one.orphaned(5)

    def check_levels(_sample, levels):
        for level in levels:
            one.orphaned(6)
            checked.append(level)

    monkeypatch.setattr(one._releases[0], "look", lambda *_: MIB)
    monkeypatch.setattr(one._releases[0], "note_kept", check_levels)
    one.look()
    assert (checked, one._levels) == ([5], {5, 6})


def test_managed_memory_is_not_compared_with_nvml():
    books = Books(process(900 * MIB, 512 * MIB, managed=100 * MIB))
    reconciler(books, {ME: 800 * MIB}).look()
    assert books.entry.bytes[0] == 900 * MIB


def test_a_context_that_only_nvml_shows_is_counted_once_until_nvml_shows_it_no_longer():
    """The entry is younger than the context: the process was adopted, or its first call of the entry is no creation."""
    books = Books(replace(process(10 * MIB), contexts=one(0)))
    rows = {ME: 530 * MIB}
    reconciliation = reconciler(books, lambda: rows)
    for _ in range(2):
        reconciliation.look()
        assert (books.told, books.entry.contexts[0], books.entry.overhead[0]) == (["seen"], 1, 520 * MIB)
    rows.clear()
    for _ in range(2):
        reconciliation.look()
        assert (books.told, books.entry.contexts[0], books.entry.overhead[0]) == (["seen", "gone"], 0, 0)


def test_a_recorded_context_is_not_counted_by_a_row_of_nvml():
    books = Books(process(10 * MIB))
    rows = {ME: 530 * MIB}
    reconciliation = reconciler(books, lambda: rows)
    reconciliation.look()
    rows.clear()
    reconciliation.look()
    assert (books.told, books.entry.contexts[0], books.entry.overhead[0]) == ([], 1, 520 * MIB)


@pytest.mark.parametrize("row", [None, 530 * MIB])
def test_no_context_is_counted_by_an_unknown_row_or_during_a_change(row):
    books = Books(replace(process(10 * MIB, quiet=row is None), contexts=one(0)))
    reconciler(books, {ME: row}).look()
    assert (books.told, books.entry.contexts[0]) == ([], 0)


def test_a_row_of_an_ended_process_shows_no_context_of_a_later_process_of_its_pid():
    books = Books(replace(process(0), contexts=one(0)))
    books.orphans.all.append(orphan(530 * MIB, ME))
    reconciler(books, {ME: 530 * MIB}, 530 * MIB).look()
    assert (books.told, books.entry.contexts[0], books.entry.overhead[0]) == ([], 0, 0)


def test_nothing_is_corrected_during_a_change():
    books = Books(process(900 * MIB, quiet=False))
    one = reconciler(books, {ME: 5 * MIB})
    one.look()
    assert books.entry.bytes[0] == 900 * MIB
    assert one.truth.drift == {}


@pytest.mark.parametrize(("row", "drift"), [({}, {(ME, 0): 0}), ({ME: 300 * MIB}, {})])
def test_a_process_that_is_parked_or_woken_is_not_corrected(row, drift):
    """Its row may be that of a copy that is not complete: then there is no drift to report."""
    entry = replace(process(0, 512 * MIB), flags=abi.PARKED, parked=one(900 * MIB))
    books = Books(entry)
    looks = reconciler(books, row, 0)
    for _ in range(GONE + 1):
        looks.look()
        assert (replace(books.entry, peak=entry.peak), looks.truth.drift) == (entry, drift)


def test_a_process_that_is_about_to_be_parked_keeps_its_charge():
    books = Books(replace(process(900 * MIB, 512 * MIB), flags=abi.PARKED))
    looks = reconciler(books, {}, 0)
    for _ in range(GONE + 1):
        looks.look()
    assert (books.entry.bytes[0], looks.truth.drift) == (900 * MIB, {})


def test_a_refused_correction_is_repeated_and_the_rest_is_reported():
    books = Books(process(900 * MIB))
    books.refuses = 1
    one = reconciler(books, {ME: 950 * MIB})
    one.look()
    assert books.entry.bytes[0] == 950 * MIB
    books.refuses = 99
    one = reconciler(books, {ME: 930 * MIB})
    one.look()
    assert (books.entry.bytes[0], one.truth.drift) == (950 * MIB, {(ME, 0): 20 * MIB})


def test_a_missing_charge_is_entered_though_each_correction_is_refused():
    books = Books(process(900 * MIB))
    books.refuses = 99
    one = reconciler(books, {ME: 970 * MIB})
    one.look()
    assert (books.entry.bytes[0], one.truth.drift) == (970 * MIB, {(ME, 0): 0})


@pytest.mark.parametrize("says", [None, {ME: None}, {}], ids=["no list", "N/A", "has a context and is not named"])
@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_is_corrected_without_a_value_of_nvml(says, quiet):
    """Above all, a process without a value is not treated as a process that holds nothing."""
    books = Books(process(900 * MIB, 512 * MIB, quiet=quiet))
    one = reconciler(books, says)
    for _ in range(3):
        one.look()
    assert books.entry.bytes[0] == 900 * MIB
    assert books.entry.overhead[0] == 512 * MIB
    assert (ME, 0) not in one.truth.drift
    assert books.moved == []


def test_a_process_without_a_context_and_row_holds_its_witnessed_bytes():
    """The process has handles and pools on the device, which are in no row. Its modules were freed."""
    books = Books(replace(process(900 * MIB, 512 * MIB, managed=100 * MIB), contexts=(0,) * 16))
    one = reconciler(books, {})
    one.look()
    assert (books.entry.bytes[0], books.entry.overhead[0]) == (388 * MIB, 0)
    assert one.truth.drift == {}  # unknown: NVML does not show it


@pytest.mark.parametrize("late", [{"late": True}, {"levels": ()}, {}])
def test_late_charges_follow_their_process_to_its_present_levels(late):
    """The main thread may have moved the process after the entry was read."""
    books = Books(replace(process(0), **late))
    reconciler(books, {}).look()
    assert (books.finished, books.moved) == ([(ME, 1)] if late else [], [])


# -- a process that is never quiet


def test_an_unexplained_row_of_a_busy_process_is_charged():
    books = Books(process(900 * MIB, 100 * MIB, quiet=False))
    books.churn = 50 * MIB
    one = reconciler(books, {ME: 1000 * MIB})
    one.look()
    assert (books.entry.bytes[0], books.entry.overhead[0]) == (950 * MIB, 150 * MIB), "50 MiB exceed the peak"
    assert set(books.marked) == {(ME, 0)}
    one.look()
    assert books.entry.bytes[0] == 950 * MIB


@pytest.mark.parametrize("churn", [100 * MIB, 500 * MIB])
def test_bytes_since_the_mark_of_a_busy_process_may_explain_its_row(churn):
    books = Books(process(900 * MIB, quiet=False))
    books.churn = churn
    reconciler(books, {ME: 1000 * MIB}).look()
    assert books.entry.bytes[0] == 900 * MIB


def test_managed_memory_does_not_explain_the_row_of_a_busy_process():
    books = Books(process(900 * MIB, managed=300 * MIB, quiet=False))
    reconciler(books, {ME: 700 * MIB}).look()
    assert books.entry.overhead[0] == 100 * MIB


def test_a_quiet_process_is_not_marked():
    books = Books(process(900 * MIB))
    reconciler(books, {ME: 900 * MIB}).look()
    assert books.marked == []


# -- orphans: test_device_balance.py tests which bytes are released


@pytest.mark.parametrize(("age_ns", "left"), [(0, 40), (2 * SLACK_AFTER_NS, 8)])
def test_the_driver_s_slack_is_subtracted_only_from_old_orphans(age_ns, left):
    books, since_ns = Books(process(900 * MIB)), time.monotonic_ns() - age_ns
    books.orphans.all = [orphan(64 * MIB, since_ns=since_ns)]
    one = reconciler(books, {ME: 900 * MIB}, lambda: held_beside_the_rest(40 * MIB))
    for _ in range(3 * CALM_LOOKS):
        one.look()
    assert books.orphans.bytes == left * MIB


@pytest.mark.parametrize("named", [True, False])
def test_no_slack_is_subtracted_from_a_young_orphan(named):
    books = Books(process(900 * MIB))
    old = orphan(64 * MIB, tgid=8, since_ns=1)
    young = orphan(64 * MIB, since_ns=time.monotonic_ns())
    books.orphans.all, rows = [old, young], {ME: 900 * MIB} | ({8: 64 * MIB} if named else {})
    rest = CONTEXT_REST_BYTES if named else 0
    one = reconciler(books, rows, lambda: held_beside_the_rest(128 * MIB) + rest)
    for _ in range(3 * CALM_LOOKS):
        one.look()
    assert {o.tgid: o.bytes // MIB for o in books.orphans.all} == {8: 64 if named else 32, 9: 64}


def test_rows_of_ended_processes_are_no_slack():
    """Bytes that NVML shows for exited processes are no slack: each process could leave as many bytes uncharged."""
    books, held = Books(process(900 * MIB)), [0]
    rows = {ME: 900 * MIB}
    one = reconciler(books, rows, lambda: held_beside_the_rest(held[0]) + (len(rows) - 1) * CONTEXT_REST_BYTES)
    for tgid in (8, 9, 10):
        books.orphans.all.append(orphan(30 * MIB, tgid=tgid))
        rows[tgid] = 30 * MIB
        held[0] += 30 * MIB
        for _ in range(3 * CALM_LOOKS):
            one.look()
    assert books.orphans.bytes == 90 * MIB


@pytest.mark.parametrize("room", [1 * MIB, 2 * MIB, 3 * MIB])
@pytest.mark.parametrize(("age_ns", "left"), [(0, 2), (2 * SLACK_AFTER_NS, 0)])
def test_bytes_of_a_previous_program_are_an_orphan_while_young_and_later_of_the_process(room, age_ns, left):
    """The process has executed another program, so NVML has one row for both."""
    books = Books(process(900 * MIB, overhead=518 * MIB))
    books.orphans.all = [orphan(2 * MIB, tgid=ME, since_ns=time.monotonic_ns() - age_ns)]
    one = reconciler(books, {ME: 902 * MIB}, lambda: held_beside_the_rest(room))
    for _ in range(3 * CALM_LOOKS):
        one.look()
    assert (books.orphans.bytes, books.entry.bytes[0]) == (left * MIB, (902 - left) * MIB)


def kept_ns(books, looks=CALM_LOOKS, orphaned=()):
    """Return when a comparison recorded that the device keeps all bytes, or None if none did.

    The time is in ns after the beginning of the first comparison.
    """
    one, begun_ns = reconciler(books, {ME: 900 * MIB}, lambda: held_beside_the_rest(64 * MIB)), time.monotonic_ns()
    for level in orphaned:
        one.orphaned(level)
    for _ in range(looks):
        one.look()
    noted_ns = books.orphans.kept.get((5, 0))
    return None if noted_ns is None else noted_ns - begun_ns


@pytest.mark.parametrize("ended_ago_ns", [None, SETTLED_NS, VAIN_NS], ids=["freed", "ended", "ended long ago"])
def test_bytes_that_the_device_keeps_are_recorded(ended_ago_ns):
    """The process has freed exported memory, or has ended a while ago. The driver frees nothing more by itself."""
    books = Books(process(900 * MIB))
    ended_ns = time.monotonic_ns() - ended_ago_ns if ended_ago_ns else 0
    books.orphans.all = [orphan(64 * MIB, since_ns=time.monotonic_ns(), ended_ns=ended_ns)]
    assert kept_ns(books, CALM_LOOKS - 1) is None
    assert 0 <= kept_ns(books) <= SETTLED_NS


def test_an_orphan_with_a_row_is_kept_even_if_the_bytes_in_use_are_too_few():
    """The reconciler subtracts CONTEXT_REST_BYTES, which is rounded up so that no orphan is released too late.

    Therefore the remaining bytes may be fewer than the orphan's.
    """
    books = Books(process(900 * MIB))
    books.orphans.all = [orphan(64 * MIB, since_ns=time.monotonic_ns())]
    in_use = held_beside_the_rest(64 * MIB) + CONTEXT_REST_BYTES - MIB
    one = reconciler(books, {ME: 900 * MIB, 9: 64 * MIB}, lambda: in_use)
    for _ in range(CALM_LOOKS):
        one.look()
    assert books.orphans.bytes == 64 * MIB
    assert books.orphans.kept


def test_an_orphan_of_a_just_ended_process_is_not_recorded_as_kept():
    books = Books(process(900 * MIB))
    books.orphans.all = [orphan(64 * MIB, ended_ns=time.monotonic_ns())]
    assert kept_ns(books) is None


@pytest.mark.parametrize(("ended_ago_ns", "is_noted"), [(2 * SETTLED_NS, False), (VAIN_NS, True)])
def test_an_orphan_of_an_exiting_process_is_recorded_as_kept_only_after_the_longest_exit(
    monkeypatch, ended_ago_ns, is_noted
):
    exiting = {9}
    monkeypatch.setattr("fgpu_ebpf.linux.procfs.exiting", lambda pid: pid in exiting)
    books = Books(process(900 * MIB))
    books.orphans.all = [orphan(64 * MIB, tgid=9, ended_ns=time.monotonic_ns() - ended_ago_ns)]
    one = reconciler(books, {ME: 900 * MIB}, lambda: held_beside_the_rest(64 * MIB))
    for _ in range(CALM_LOOKS):
        one.look()
    assert bool(books.orphans.kept) == is_noted
    exiting.clear()
    one.look()
    assert bool(books.orphans.kept) == is_noted, "the driver may need a moment after the exit"


def test_a_release_in_part_does_not_end_the_wait_after_an_exit(monkeypatch):
    exiting = {9}
    monkeypatch.setattr("fgpu_ebpf.linux.procfs.exiting", lambda pid: pid in exiting)
    books, held = Books(process(900 * MIB)), [64 * MIB]
    now_ns = time.monotonic_ns()
    books.orphans.all = [orphan(64 * MIB, since_ns=now_ns, ended_ns=now_ns - 2 * SETTLED_NS)]
    one = reconciler(books, {ME: 900 * MIB}, lambda: held_beside_the_rest(held[0]))
    one.look()
    held[0] = 24 * MIB
    for _ in range(CALM_LOOKS - 1):
        one.look()
    exiting.clear()
    one.look()
    assert (books.orphans.bytes, books.orphans.kept) == (24 * MIB, {})


def test_an_orphan_is_not_released_or_recorded_anew_before_enough_samples_show_its_release():
    books, held = Books(process(900 * MIB)), [64 * MIB]
    books.orphans.all = [orphan(64 * MIB, since_ns=time.monotonic_ns())]
    one = reconciler(books, {ME: 900 * MIB}, lambda: held_beside_the_rest(held[0]))
    for _ in range(CALM_LOOKS):
        one.look()
    held[0], before = 24 * MIB, dict(books.orphans.kept)
    assert before
    for _ in range(CALM_LOOKS - 1):
        one.look()
        assert (books.orphans.bytes, books.orphans.kept) == (64 * MIB, before)
    one.look()
    assert books.orphans.bytes == 24 * MIB
    assert books.orphans.kept != before


def test_bytes_without_an_entry_are_recorded_as_kept_only_after_the_longest_exit(monkeypatch):
    books = Books(process(900 * MIB))
    books.orphans.without = 64 * MIB
    assert kept_ns(books, CALM_LOOKS + 1, orphaned=[5]) is None
    monkeypatch.setattr("fgpu_ebpf.agent.orphan_release.VAIN_NS", 0)
    assert kept_ns(books, CALM_LOOKS + 1, orphaned=[5]) is not None


def held_beside_the_rest(bytes_: int) -> int:
    """Return the bytes in use, if the one process has 900 MiB and this many bytes have no owner."""
    return 900 * MIB + CONTEXT_REST_BYTES + DEVICE_REST_BYTES + bytes_


def test_orphans_are_released_when_the_device_does_not_hold_them():
    books, in_use = Books(process(900 * MIB)), [held_beside_the_rest(64 * MIB)]
    held = orphan(64 * MIB, since_ns=time.monotonic_ns())
    books.orphans.all = [held]
    one = reconciler(books, {ME: 900 * MIB}, lambda: in_use[0])
    for _ in range(CALM_LOOKS + 1):
        one.look()
    assert books.orphans.bytes == 64 * MIB
    in_use[0] = held_beside_the_rest(24 * MIB)
    for _ in range(CALM_LOOKS):
        one.look()
    assert books.orphans.bytes == 24 * MIB
    assert one.truth.orphans == [held], "the published orphans are not those before the comparison"
    assert one.truth.unexplained == {0: 0}


@pytest.mark.parametrize(
    ("says", "in_use"),
    [
        pytest.param(None, 0, id="no rows"),
        pytest.param({ME: 900 * MIB}, None, id="no bytes in use"),
        pytest.param({ME: 900 * MIB, 1: None}, 0, id="a row is N/A"),
    ],
)
def test_orphans_are_kept_if_nvml_s_answers_are_incomplete(says, in_use):
    books = Books(process(900 * MIB))
    books.orphans.all, books.orphans.without = [orphan(64 * MIB)], 3 * MIB
    one = reconciler(books, says, in_use)
    one.orphaned(5)
    for _ in range(3 * CALM_LOOKS):
        one.look()
    assert (books.orphans.bytes, books.orphans.without) == (64 * MIB, 3 * MIB)


def test_an_importer_is_charged_before_the_orphan_of_the_exporter_is_released():
    books = Books(process(512 * MIB))
    books.orphans.all, told = [orphan(64 * MIB, ended_ns=0)], []
    books.orphans.let_go = lambda *_: told.append(books.entry.bytes[0]) or True
    one = reconciler(books, {ME: 576 * MIB}, lambda: 576 * MIB + CONTEXT_REST_BYTES + DEVICE_REST_BYTES)
    for _ in range(CALM_LOOKS):
        one.look()
    assert told == [576 * MIB]


def test_only_orphaned_bytes_need_more_than_one_sample():
    books, asked = Books(process(900 * MIB)), []
    one = reconciler(books, {ME: 900 * MIB}, lambda: asked.append(1) or held_beside_the_rest(0))
    one.look()
    one.look()
    assert len(asked) == 1  # for the bytes that nothing explains
    books.orphans.all = [orphan(64 * MIB)]
    one.look(False)
    assert len(asked) == 1 + device_sample.SAMPLES


def test_orphaned_bytes_without_an_entry_are_released_only_at_reported_levels():
    books = Books(process(900 * MIB))
    books.orphans.without = 64 * MIB
    one = reconciler(books, {ME: 900 * MIB}, lambda: held_beside_the_rest(0))
    for _ in range(2 * CALM_LOOKS):
        one.look()
    assert books.orphans.without == 64 * MIB
    one.orphaned(5)
    for _ in range(CALM_LOOKS + 1):  # comparisons before the report are no evidence
        one.look()
    assert books.orphans.without == 0


def test_orphaned_bytes_without_an_entry_are_not_released_by_an_older_sample():
    """The bytes belonged to a live process in that sample, so the device seemed to hold no orphaned bytes."""
    books = Books(process(900 * MIB))
    one = reconciler(books, {ME: 900 * MIB}, lambda: held_beside_the_rest(0))
    one.orphaned(5)
    for _ in range(CALM_LOOKS):
        one.look(False)
    books.orphans.without = 64 * MIB
    one.look(False)
    assert books.orphans.without == 64 * MIB
    one.look(False)
    assert books.orphans.without == 0


def test_a_row_of_an_ended_process_charges_no_later_process_of_its_pid():
    books = Books(process(100 * MIB))
    books.orphans.all = [orphan(64 * MIB, tgid=ME)]
    one = reconciler(books, {ME: 164 * MIB}, lambda: held_beside_the_rest(-736 * MIB))
    one.look()
    assert (books.entry.bytes[0], books.orphans.bytes) == (100 * MIB, 64 * MIB)
    assert one.truth.ended == {0: {ME: 64 * MIB}}


def test_a_dead_pid_in_nvml_is_no_process():
    books = Books(process(100 * MIB))
    books.orphans.all = [orphan(64 * MIB, tgid=1 << 22)]
    one = reconciler(books, {ME: 100 * MIB, 1 << 22: 64 * MIB}, lambda: held_beside_the_rest(0))
    one.look()
    assert (books.moved, one.truth.pids()) == ([], {ME})


def test_nvml_is_read_more_often_for_younger_orphans():
    now = time.monotonic_ns()
    ages = [0, 10 * 10**9, 100 * 10**9]
    assert [_period([orphan(1, since_ns=now - age)]) for age in ages] == [seconds for _, seconds in ORPHAN_PERIODS]
    assert _period([orphan(1, since_ns=now - age) for age in ages]) == ORPHAN_PERIODS[0][1]
    assert _period([]) == PERIOD_SECONDS


def test_a_process_without_an_nvml_value_is_not_adopted_and_others_are_corrected():
    books = Books(process(900 * MIB, 512 * MIB))
    one = reconciler(books, {ME: 1000 * MIB, os.getppid(): None})
    one.look()
    assert books.entry.bytes[0] == 1000 * MIB
    assert books.moved == [], "adopted with an unknown charge"


def test_an_ended_process_is_not_adopted_while_the_driver_holds_its_memory():
    """The ended process is not reaped yet. A process without its first thread counts as alive."""
    books = Books(process(0))
    with (
        subprocess.Popen(["true"]) as dead,
        subprocess.Popen([sys.executable, "-c", LEADERLESS], stdout=subprocess.PIPE) as alive,
    ):
        assert alive.stdout
        alive.stdout.readline()
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        while "Z (zombie)" not in Path(f"/proc/{alive.pid}/status").read_text():
            time.sleep(0.01)
        reconciler(books, {dead.pid: 5 * MIB, alive.pid: 5 * MIB}).look()
        alive.kill()
    assert books.moved == [(alive.pid, (5,))]


def test_a_process_adopted_while_it_exits_is_reaped_without_its_parent():
    """The process is removed from the ledger, because no event reports its end."""
    with subprocess.Popen(["true"]) as dead:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        for flags, reaped in ((0, [dead.pid]), (Seen.CALL, [])):
            books = Books(replace(process(0), flags=flags))
            books.processes = lambda books=books: {dead.pid: books.entry}
            books.reap = lambda tgid, _, found=(found := []): found.append(tgid)
            reconciler(books, {}).look()
            assert found == reaped, flags


def test_a_process_without_a_kernel_entry_is_adopted():
    books = Books(process(0))
    parent = os.getppid()
    reconciler(books, {parent: 5 * MIB}).look()
    assert books.moved == [(parent, (5,))]


def test_entries_of_a_process_between_two_scans_are_removed():
    """The process started and exited between two scans."""
    books = Books(process(0))
    one = reconciler(books, {})
    one.look()
    assert books.swept == 0
    books.so_far += 1
    one.look()
    one.look()
    assert books.swept == 1
    books.so_far += 1
    one.look()
    assert books.swept == 2


@given(st.integers(-(2**40), 2**40), st.integers(0, 2**40), st.integers(-(2**40), 0))
def test_pool_bytes_are_never_reduced_by_figures_of_nvml(exact, pool, gone):
    overhead = overhead_for(exact, pool, gone)
    assert overhead >= exact
    assert overhead == exact or (overhead <= gone and overhead - exact <= pool)
    assert pool or overhead == exact


def test_the_age_of_a_device_is_that_of_its_own_last_answer():
    """Answers of other devices do not lower the age."""
    answers = {0: {}, 1: {}, 2: None, 3: {}}
    used = {0: 1, 1: 1, 2: 1, 3: None}
    nvml = SimpleNamespace(
        devices=[SimpleNamespace(index=i) for i in answers],
        used_bytes=used.get,
        in_mig_mode=lambda index: index == 1,
        process_bytes=answers.get,
        taken_bytes=lambda _: None,
        process_percent=lambda *_: None,
        xids=list,
        watched=frozenset,
        look_for_missing=lambda: None,
    )
    one = Reconciler(nvml, Books(process(0)), lambda _: (5,))
    one.look()
    first = dict(one.truth.answered)
    assert first.keys() == {0, 1}
    answers[1] = None
    time.sleep(0.01)
    one.look()
    assert one.truth.answered[1] == first[1] < one.truth.answered[0]
    assert one.truth.mig == {1}


def test_the_first_comparison_shows_which_devices_report_xids():
    """NVML reports XIDs of devices after the first request only."""
    watched = set()
    one = reconciler(Books(process(0)), {})
    one._nvml.watched = lambda: frozenset(watched)
    one._nvml.xids = lambda: watched.add(0) or []
    one.look()
    assert one.truth.xids.keys() == {0}


def test_a_failed_comparison_reports_its_reason_and_refreshes_nothing():
    def fails():
        raise RuntimeError("the ledger cannot be read")

    one = reconciler(Books(process(0)), fails)
    one.start()
    eventually(lambda: one.truth.failure)
    one.stop()
    assert one.truth.failure == "RuntimeError: the ledger cannot be read"
    assert not one.truth.answered
    found = check({0: 0.1}, one.truth.failure)
    assert not found.ok
    assert "the ledger cannot be read" in found.found


@pytest.mark.parametrize(
    ("ages", "ok", "says"),
    [({0: 0.2, 1: 0.4}, True, "0.4 s ago"), ({0: 0.2, 1: None}, False, "gpu 1 never"),
     ({0: 5.5, 1: 0.2}, False, "gpu 0 5.5 s ago")],
)  # fmt: skip
def test_doctor_shows_the_oldest_age(ages, ok, says):
    found = check(ages, "")
    assert found.ok is ok
    assert says in found.found
    assert ok or found.fix


def test_the_reconciler_wakes_for_new_processes_at_once_and_for_others_after_each_full_pass():
    """A process that already has a shim may call another library at any time."""
    one = reconciler(Books(replace(process(512 * MIB), flags=abi.Seen.SHIM)), {ME: 512 * MIB})
    woken = []
    for is_full in (False, False, True, True):
        one.look(is_full)
        woken.append(bool(select.select([one], [], [], 0)[0]))
        one.clear()
    assert woken == [True, False, True, True]
    assert one.truth.strangers() == set()


def test_the_reconciler_does_not_wake_without_processes():
    one = reconciler(Books(process(0)), {})
    one.look()
    assert not select.select([one], [], [], 0)[0]


@pytest.mark.parametrize(("in_use", "kept"), [(899 * MIB, 0), (900 * MIB, 900 * MIB), (None, 900 * MIB)])
def test_memory_of_an_unlisted_process_that_the_device_cannot_hold_is_no_longer_charged(in_use, kept):
    """NVML does not list the process. In successive comparisons the device holds fewer bytes than the charge."""
    books = Books(process(900 * MIB))
    one = reconciler(books, {}, in_use)
    for _ in range(GONE - 1):
        one.look()
        assert books.entry.bytes[0] == 900 * MIB
    for _ in range(2):
        one.look()
        assert books.entry.bytes[0] == kept


@pytest.mark.parametrize(("in_use", "kept"), [(287 * MIB, 160 * MIB), (288 * MIB, 288 * MIB), (None, 288 * MIB)])
def test_pointers_of_an_adopted_process_end_with_its_context(in_use, kept):
    """No probe has recorded the context. Handles outlive it."""
    entry = replace(process(288 * MIB), contexts=(0,) * 16, handles=one(160 * MIB))
    books, taken = Books(entry), [in_use]
    looks = reconciler(books, {}, lambda: taken[0])
    for _ in range(GONE - 1):
        looks.look()
        assert books.entry.bytes[0] == 288 * MIB
    for taken[0] in (in_use, in_use, None):
        looks.look()
        assert books.entry.bytes[0] == kept


def test_each_end_of_a_context_lowers_the_charge_to_nvml_s_value_exactly_once():
    """Pool bytes that the driver has freed stay charged, except those that ended with a context."""
    books, rows = Books(replace(process(900 * MIB, pool=300 * MIB), ended=one(1))), {ME: 700 * MIB}
    reconciler_ = reconciler(books, rows)
    reconciler_.look()
    assert books.entry.bytes[0] == 700 * MIB
    for shown in (700, 600):
        rows[ME] = shown * MIB
        reconciler_.look()
        assert books.entry.bytes[0] == 700 * MIB, "the charge has changed, although no further context has ended"
    books.entry = replace(books.entry, ended=one(2))
    reconciler_.look()
    assert books.entry.bytes[0] == 600 * MIB
