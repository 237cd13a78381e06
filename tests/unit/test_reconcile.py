"""What NVML says, entered in the ledger: against a stand-in for both, which may answer as no real one would."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.ledger import Process
from fgpu_ebpf.reconcile import Reconciler, overhead_for

MIB = 1 << 20
ME = os.getpid()


def process(
    charged: int, overhead: int = 0, managed: int = 0, pool: int = 0, changes: int = 7, quiet: bool = True
) -> Process:
    one = lambda n: (n, *[0] * 15)  # noqa: E731
    return Process(1, (5,), 0, changes, quiet, one(charged), one(overhead), one(managed), one(pool), one(1))


class Books:
    """A ledger of one process."""

    def __init__(self, entry: Process) -> None:
        self.entry, self.in_a_call, self.moved, self.refuses = entry, False, [], 0

    def processes(self):
        return {ME: self.entry}

    def busy(self):
        return {ME} if self.in_a_call else set()

    def overhead(self, tgid, generation, device, bytes_, changes):
        if self.refuses or changes != self.entry.changes:
            self.refuses -= 1
            return False
        more = bytes_ - self.entry.overhead[0]
        charged = (self.entry.bytes[0] + more, *[0] * 15)
        self.entry = replace(self.entry, bytes=charged, overhead=(bytes_, *[0] * 15))
        return True

    def move(self, pid, generation, levels):
        self.moved.append((pid, levels))

    def sweep(self):
        return 0

    def reap(self, tgid, generation):
        raise AssertionError("nobody has died")


def reconciler(books: Books, says) -> Reconciler:
    nvml = SimpleNamespace(
        devices=[SimpleNamespace(index=0)],
        used_bytes=lambda _: 1,
        process_bytes=lambda _: says() if callable(says) else says,
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


def test_nothing_is_corrected_in_the_middle_of_a_call():
    books = Books(process(900 * MIB))
    books.in_a_call = True
    one = reconciler(books, {ME: 5 * MIB})
    one.look()
    assert books.entry.bytes[0] == 900 * MIB
    assert one.truth.drift == {}


def test_nothing_is_corrected_in_the_middle_of_a_change():
    books = Books(process(900 * MIB, quiet=False))
    reconciler(books, {ME: 5 * MIB}).look()
    assert books.entry.bytes[0] == 900 * MIB


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


@pytest.mark.parametrize("says", [None, {}])
def test_where_nvml_says_nothing_nothing_is_decided(says):
    books = Books(process(0))
    one = reconciler(books, says)
    one.look()
    assert books.entry.bytes[0] == 0
    assert books.moved == []


def test_a_process_that_the_kernel_never_saw_is_adopted():
    books = Books(process(0))
    parent = os.getppid()
    reconciler(books, {parent: 5 * MIB}).look()
    assert books.moved == [(parent, (5,))]


@given(st.integers(-(2**40), 2**40), st.integers(0, 2**40))
def test_pool_bytes_are_never_taken_back_by_nvml(exact, pool):
    overhead = overhead_for(exact, pool)
    assert overhead >= exact
    assert overhead == exact or (overhead <= 0 and overhead - exact <= pool)
    assert pool or overhead == exact
