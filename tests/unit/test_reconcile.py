"""What NVML says, entered in the ledger: against a stand-in for both, which may answer as no real one would."""

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

from fgpu_ebpf import devices, pages
from fgpu_ebpf.devices import Nvml
from fgpu_ebpf.pages import Seen
from fgpu_ebpf.processes import Process
from fgpu_ebpf.reconcile import GONE, NEVER_QUIET, Reconciler, check, overhead_for

MIB = 1 << 20
LEADERLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall(60 if __import__("platform").machine() == "x86_64" else 93, 0)
"""
ME = os.getpid()


def process(
    charged: int, overhead: int = 0, managed: int = 0, pool: int = 0, changes: int = 7, quiet: bool = True
) -> Process:
    one = lambda n: (n, *[0] * 15)  # noqa: E731
    return Process(1, (5,), 0, changes, quiet, one(charged), one(overhead), one(managed), one(pool), one(1))


class Books:
    """A ledger of one process."""

    def __init__(self, entry: Process) -> None:
        self.entry, self.moved, self.refuses = entry, [], 0
        self.times = SimpleNamespace(shared=dict, turns=dict)
        self.so_far, self.swept = 1, 0

    def processes(self):
        return {ME: self.entry}

    def overhead(self, tgid, generation, device, bytes_, changes):
        if self.refuses or changes != self.entry.changes:
            self.refuses -= 1
            return False
        more = bytes_ - self.entry.overhead[0]
        charged = (self.entry.bytes[0] + more, *[0] * 15)
        self.entry = replace(self.entry, bytes=charged, overhead=(bytes_, *[0] * 15))
        return True

    def raise_overhead(self, tgid, generation, device, more):
        return self.overhead(tgid, generation, device, self.entry.overhead[0] + more, self.entry.changes)

    def move(self, pid, generation, levels):
        self.moved.append((pid, levels))

    def processes_so_far(self):
        return self.so_far

    def sweep(self):
        self.swept += 1
        return 0

    def reap(self, tgid, generation):
        raise AssertionError("nobody has died")


def reconciler(books: Books, says, left: int | None = None) -> Reconciler:
    nvml = SimpleNamespace(
        devices=[SimpleNamespace(index=0)],
        used_bytes=lambda _: 1,
        process_bytes=lambda _: says() if callable(says) else says,
        process_percent=lambda *_: None,
        unnamed_bytes=lambda *_: left,
        xids=list,
        watched=frozenset,
    )
    return Reconciler(nvml, books, lambda _: (5,))


def test_what_nvml_shows_beyond_the_witnessed_is_overhead():
    books = Books(process(900 * MIB, 512 * MIB))
    one = reconciler(books, {ME: 1000 * MIB})
    one.look()
    assert books.entry.bytes[0] == 1000 * MIB
    assert books.entry.overhead[0] == 612 * MIB
    assert one.truth.drift == {(ME, 0): 0}


def test_managed_memory_is_none_of_nvml_s_business():
    books = Books(process(900 * MIB, 512 * MIB, managed=100 * MIB))
    reconciler(books, {ME: 800 * MIB}).look()
    assert books.entry.bytes[0] == 900 * MIB


def test_nothing_is_corrected_in_the_middle_of_a_change():
    books = Books(process(900 * MIB, quiet=False))
    one = reconciler(books, {ME: 5 * MIB})
    one.look()
    assert books.entry.bytes[0] == 900 * MIB
    assert one.truth.drift == {}


def test_a_refused_correction_is_tried_again_and_what_is_left_is_told():
    books = Books(process(900 * MIB))
    books.refuses = 1
    one = reconciler(books, {ME: 950 * MIB})
    one.look()
    assert books.entry.bytes[0] == 950 * MIB
    books.refuses = 99
    one = reconciler(books, {ME: 970 * MIB})
    one.look()
    assert one.truth.drift == {(ME, 0): -20 * MIB}


@pytest.mark.parametrize("says", [None, {ME: None}, {}], ids=["no list", "N/A", "has a context and is not named"])
@pytest.mark.parametrize("quiet", [True, False])
def test_where_nvml_says_nothing_nothing_is_decided(says, quiet):
    """Above all not that a tenant holds nothing."""
    books = Books(process(900 * MIB, 512 * MIB, quiet=quiet))
    one = reconciler(books, says)
    for _ in range(NEVER_QUIET + 1):
        one.look()
    assert books.entry.bytes[0] == 900 * MIB
    assert books.entry.overhead[0] == 512 * MIB
    assert (ME, 0) not in one.truth.drift
    assert books.moved == []


def test_who_has_no_context_and_is_not_named_holds_nothing():
    books = Books(replace(process(900 * MIB, 512 * MIB), contexts=(0,) * 16))
    one = reconciler(books, {})
    one.look()
    assert books.entry.bytes[0] == 0
    assert one.truth.drift == {(ME, 0): 0}


def test_one_of_whom_nvml_says_nothing_does_not_hide_the_others():
    books = Books(process(900 * MIB, 512 * MIB))
    one = reconciler(books, {ME: 1000 * MIB, os.getppid(): None})
    one.look()
    assert books.entry.bytes[0] == 1000 * MIB
    assert books.moved == [], "adopted with nobody knows what"


@pytest.mark.parametrize(("says", "left"), [(None, 7), ({ME: 5, 1: None}, 7), ({ME: 5}, 0)])
def test_orphans_are_let_go_only_where_all_holders_are_known(says, left):
    books = Books(process(5))
    orphans = {0: 7}
    books.orphaned = lambda _: dict(orphans)
    books.disown = lambda _, device, bytes_: orphans.update({device: orphans[device] - bytes_})
    one = reconciler(books, says)
    one.orphaned(5)
    one.look()
    assert orphans == {0: left}


@pytest.mark.parametrize(
    ("said", "held"),
    [([(7, 5), (7, 6), (8, 9)], {7: 11, 8: 9}), ([(7, 5), (7, None), (8, 9)], {7: None, 8: 9}),
     ([(7, None), (7, 5)], {7: None}), ([], {})],
)  # fmt: skip
def test_na_of_one_process_is_not_nothing(said, held):
    assert nvml_that_says(said).process_bytes(0) == held


def nvml_that_says(said, code=0):
    """A library's function, as NVML has it: bytes None are "N/A"."""
    calls = []

    def ask(_, n, rows):
        room, n._obj.value = n._obj.value, len(said)
        calls.append(room)
        if room < len(said):
            return devices.pynvml.NVML_ERROR_INSUFFICIENT_SIZE
        for row, (pid, bytes_) in zip(rows, said, strict=False):
            row.pid, row.usedGpuMemory = pid, 2**64 - 1 if bytes_ is None else bytes_
        return code

    nvml = Nvml.__new__(Nvml)
    nvml._handles = [None]
    nvml._holders = devices.Holders(SimpleNamespace(nvmlDeviceGetComputeRunningProcesses_v3=ask))
    nvml.calls = calls
    return nvml


def test_nvml_is_asked_once_however_many_there_are():
    nvml = nvml_that_says([(pid, pid) for pid in range(300)])
    for _ in range(3):
        assert nvml.process_bytes(0) == {pid: pid for pid in range(300)}
    assert len(nvml.calls) == 2 + 1 + 1  # once more, to have room
    few = nvml_that_says([(7, 5)])
    assert (few.process_bytes(0), len(few.calls)) == ({7: 5}, 1)


def test_an_nvml_that_refuses_or_lacks_the_function_says_nothing():
    assert nvml_that_says([], code=3).process_bytes(0) is None
    nvml = nvml_that_says([])
    nvml._holders = devices.Holders(SimpleNamespace())
    assert nvml.process_bytes(0) is None


def test_one_that_has_ended_is_not_adopted_though_the_driver_still_holds_its_memory():
    """Nor though its parent has not taken notice; a process whose first thread is gone lives."""
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


def test_one_that_was_adopted_on_its_way_out_is_reaped_though_its_parent_takes_no_notice():
    """Nothing tells of its end any more."""
    with subprocess.Popen(["true"]) as dead:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        for flags, reaped in ((0, [dead.pid]), (Seen.CALL, [])):
            books = Books(replace(process(0), flags=flags))
            books.processes = lambda books=books: {dead.pid: books.entry}
            books.reap = lambda tgid, _, found=(found := []): found.append(tgid)
            reconciler(books, {}).look()
            assert found == reaped, flags


def test_a_process_that_the_kernel_never_saw_is_adopted():
    books = Books(process(0))
    parent = os.getppid()
    reconciler(books, {parent: 5 * MIB}).look()
    assert books.moved == [(parent, (5,))]


def test_what_a_process_left_that_nobody_ever_saw_is_swept_too():
    """It came and went between two looks."""
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


@given(st.integers(-(2**40), 2**40), st.integers(0, 2**40))
def test_pool_bytes_are_never_taken_back_by_nvml(exact, pool):
    overhead = overhead_for(exact, pool)
    assert overhead >= exact
    assert overhead == exact or (overhead <= 0 and overhead - exact <= pool)
    assert pool or overhead == exact


def test_each_device_is_as_old_as_its_own_last_answer():
    """One whose NVML answers half or not at all is not made fresh by the others."""
    answers = {0: {}, 1: {}, 2: None, 3: {}}
    used = {0: 1, 1: 1, 2: 1, 3: None}
    nvml = SimpleNamespace(
        devices=[SimpleNamespace(index=i) for i in answers],
        used_bytes=used.get,
        process_bytes=answers.get,
        unnamed_bytes=lambda *_: None,
        process_percent=lambda *_: None,
        xids=list,
        watched=frozenset,
    )
    one = Reconciler(nvml, Books(process(0)), lambda _: (5,))
    one.look()
    first = dict(one.truth.answered)
    assert first.keys() == {0, 1}
    answers[1] = None
    time.sleep(0.01)
    one.look()
    assert one.truth.answered[1] == first[1] < one.truth.answered[0]


def test_a_look_that_fails_says_why_and_makes_nothing_fresh():
    def fails():
        raise RuntimeError("the books are wet")

    one = reconciler(Books(process(0)), fails)
    one.start()
    deadline = time.monotonic() + 5
    while not one.truth.failure and time.monotonic() < deadline:
        time.sleep(0.01)
    one.stop()
    assert one.truth.failure == "RuntimeError: the books are wet"
    assert not one.truth.answered
    found = check({0: 0.1}, one.truth.failure)
    assert not found.ok
    assert "the books are wet" in found.found


@pytest.mark.parametrize(
    ("ages", "ok", "says"),
    [({0: 0.2, 1: 0.4}, True, "0.4 s ago"), ({0: 0.2, 1: None}, False, "gpu 1 never"),
     ({0: 5.5, 1: 0.2}, False, "gpu 0 5.5 s ago")],
)  # fmt: skip
def test_doctor_is_told_of_the_oldest(ages, ok, says):
    found = check(ages, "")
    assert found.ok is ok
    assert says in found.found
    assert ok or found.mend


def test_it_rings_for_others_than_before_and_for_those_who_have_no_shim():
    books = Books(replace(process(512 * MIB), flags=pages.Seen.SHIM))
    one = reconciler(books, {ME: 512 * MIB})
    rung = []
    for flags in (pages.Seen.SHIM, pages.Seen.SHIM, 0, 0, pages.Seen.SHIM):
        books.entry = replace(books.entry, flags=flags)
        one.look()
        rung.append(bool(select.select([one], [], [], 0)[0]))
        one.hush()
    assert rung == [True, False, True, True, False]
    assert one.truth.strangers() == set()


@pytest.mark.parametrize(("left", "kept"), [(899 * MIB, 0), (900 * MIB, 900 * MIB), (None, 900 * MIB)])
def test_what_a_device_lost_under_a_process_is_charged_no_more(left, kept):
    """NVML does not name it, and it is let go of where its memory is nowhere, and is so a few times in a row."""
    books = Books(process(900 * MIB))
    one = reconciler(books, {}, left)
    for _ in range(GONE - 1):
        one.look()
        assert books.entry.bytes[0] == 900 * MIB
    for _ in range(2):
        one.look()
        assert books.entry.bytes[0] == kept
