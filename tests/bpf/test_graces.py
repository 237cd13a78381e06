"""Limits are in force as soon as the kernel has them, however long it then waits for programs that run."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

import pytest

from fgpu_ebpf import bpf, pages
from fgpu_ebpf.graces import Graces
from fgpu_ebpf.ledger import _COUNTER_KEY, Count, Ledger, LevelLimits

MIB = 1 << 20
PATIENCE_SECONDS = 30.0


@pytest.fixture
def grace(monkeypatch):
    """The kernel makes a change at once, and its wait for programs ends when the test says so."""
    over = threading.Event()

    def held(call):
        def change(*given):
            call(*given)
            assert over.wait(PATIENCE_SECONDS), "whoever asked for the change waits for programs"

        return change

    for name in ("update_all", "delete_all"):
        monkeypatch.setattr(bpf, name, held(getattr(bpf, name)))
    yield over
    over.set()


@pytest.fixture
def ledger(kernel):
    """An agent's own, closed at the end."""
    with contextlib.closing(Ledger(kernel.pins)) as own:
        yield own


def held_threads():
    return [thread for thread in threading.enumerate() if thread.name == "grace"]


@pytest.fixture(autouse=True)
def nobody_held():
    """But for what the test itself asks for."""
    for thread in held_threads():
        thread.join(PATIENCE_SECONDS)


def test_a_limit_is_in_force_while_programs_are_waited_for(kernel, ledger, grace, make_level, make_client):
    level, seen = make_level(None), []
    ledger.set_limits([LevelLimits(level.cgroup, {0: 8 * MIB})], seen.append)
    one = make_client(level)
    one(f"alloc(0x1000, {6 * MIB})")
    assert (level.used, level.usage().limit) == (6 * MIB, 8 * MIB)
    assert one(f"admit({4 * MIB})") == pages.Verdict.REFUSED
    assert (seen, len(held_threads())) == ([], 2), "the place, and the cgroup"
    grace.set()
    ledger.close()
    assert (seen, held_threads()) == ([{level.cgroup}], [])


def test_a_level_is_gone_while_programs_are_waited_for_and_comes_again(kernel, ledger, grace, make_level):
    level = make_level(None)
    for bytes_ in (8 * MIB, 4 * MIB):
        ledger.set_limits([LevelLimits(level.cgroup, {0: bytes_})])
        assert (level.usage().limit, ledger.limit(level.cgroup, 0)) == (bytes_, bytes_)
        ledger.remove([level.cgroup])
        kernel.ledger.remove([level.cgroup])  # its own mapping of the page
        assert ledger.page_missing(level.cgroup)


def test_what_is_counted_of_a_level_as_it_goes_is_forgotten_when_nobody_counts_any_more(kernel, ledger, grace, level):
    late = Count(level.cgroup, 0, pages.Kind.MEMORY, pages.Reason.LIMIT)
    ledger.remove([level.cgroup])
    counters = bpf.pinned(kernel.pins / "maps/counters")
    key = _COUNTER_KEY.pack(late.cgroup, late.device, late.kind, late.reason)
    bpf.update(counters, key, (1).to_bytes(8, "little"))  # as a program does that had its page in hand
    os.close(counters)
    assert late in ledger.counters()
    grace.set()
    for thread in held_threads():
        thread.join(PATIENCE_SECONDS)
    assert late not in ledger.counters()


def test_a_full_map_is_told_of_though_another_thread_met_it(kernel, ledger, make_level):
    level, other, room = make_level(None), make_level(None), 10**12
    ledger.set_limits([LevelLimits(other.cgroup, {0: MIB})])  # from now on it knows which places are free
    outer, page = bpf.pinned(kernel.pins / "maps/pages"), bpf.create_array_page("fgpu_usage", 4096)
    before = {*ledger.tenants()}
    others = [(room + n).to_bytes(8, "little") for n in range(4096 - len(before))]
    bpf.update_all(outer, dict.fromkeys(others, page.to_bytes(4, "little")))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.E2BIG)):
            ledger.set_limits([LevelLimits(level.cgroup, {0: MIB})])
        assert ledger.page_missing(level.cgroup)
        assert ledger.limit(level.cgroup, 0) is None
    finally:
        bpf.delete_all(outer, others)
        os.close(outer)
        os.close(page)
    ledger.set_limits([LevelLimits(level.cgroup, {0: MIB})])
    assert level.usage().limit == MIB


def test_where_no_thread_may_be_started_the_change_is_made_all_the_same(kernel, make_level, monkeypatch):
    def refused(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    monkeypatch.setattr("fgpu_ebpf.graces.MOST_HELD", 1)  # so that each has to give its place back
    level, seen = make_level(None), []
    with contextlib.closing(Ledger(kernel.pins)) as own:
        own.set_limits([LevelLimits(level.cgroup, {0: 8 * MIB})], seen.append)
    assert (level.usage().limit, seen) == (8 * MIB, [{level.cgroup}])


def test_as_many_are_held_as_may_be_and_the_next_waits(monkeypatch):
    monkeypatch.setattr("fgpu_ebpf.graces.MOST_HELD", 3)
    entries, over = {}, threading.Event()

    def change(_, new):
        entries.update(new)
        over.wait(PATIENCE_SECONDS)

    monkeypatch.setattr(bpf, "lookup", lambda _, key, size: entries.get(key))
    monkeypatch.setattr(bpf, "update_all", change)
    graces = Graces()
    for n in range(3):
        graces.put(7, {bytes([n]): b"page"})
    late = threading.Thread(target=graces.put, args=(7, {b"late": b"page"}))
    late.start()
    assert (len(held_threads()), b"late" in entries) == (3, False)
    over.set()
    late.join(PATIENCE_SECONDS)
    graces.close()
    assert (b"late" in entries, held_threads()) == (True, [])


def test_a_ledger_that_is_closed_leaves_no_descriptor(kernel, make_level):
    level, before = make_level(None), len(os.listdir("/proc/self/fd"))
    with contextlib.closing(Ledger(kernel.pins)) as own:
        own.set_limits([LevelLimits(level.cgroup, {0: MIB})])
        own.remove([level.cgroup])
    assert len(os.listdir("/proc/self/fd")) == before
