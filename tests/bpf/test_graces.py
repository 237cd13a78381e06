"""A limit is in force as soon as the kernel has it, however long the kernel then waits for running programs."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.ledger import _COUNTER_KEY, Count, Ledger
from fgpu_ebpf.ledger.level_limits import LevelLimits
from fgpu_ebpf.ledger.map_in_map import MapInMapUpdates
from fgpu_ebpf.linux import bpf

MIB = 1 << 20
PATIENCE_SECONDS = 30.0
ARRAY_OF_MAPS, HASH_OF_MAPS = 12, 13


@pytest.fixture
def grace(monkeypatch):
    """Make the kernel apply a change at once, and end its wait for programs when the test requires."""
    over = threading.Event()

    def held(call):
        def change(*given):
            call(*given)
            assert over.wait(PATIENCE_SECONDS), "the caller waits for programs"

        return change

    for name in ("update_all", "delete_all"):
        monkeypatch.setattr(bpf, name, held(getattr(bpf, name)))
    yield over
    over.set()


@pytest.fixture
def ledger(kernel):
    """Return a separate ledger of an agent, which is closed at the end."""
    with contextlib.closing(Ledger(kernel.pins)) as own:
        yield own


def held_threads():
    return [thread for thread in threading.enumerate() if thread.name == "grace"]


@pytest.fixture(autouse=True)
def no_thread_held():
    """Wait until no thread of an earlier test waits for the kernel."""
    for thread in held_threads():
        thread.join(PATIENCE_SECONDS)


def test_a_limit_is_in_force_while_the_kernel_waits_for_programs(kernel, ledger, grace, make_level, make_client):
    level, seen = make_level(None), []
    ledger.set_limits([LevelLimits(level.cgroup, {0: 8 * MIB})], seen.append)
    one = make_client(level)
    one(f"alloc(0x1000, {6 * MIB})")
    assert (level.used, level.usage().limit) == (6 * MIB, 8 * MIB)
    assert one(f"admit({4 * MIB})") == abi.Verdict.REFUSED
    assert (seen, len(held_threads())) == ([], 2), "one thread for the slot and one for the cgroup"
    grace.set()
    ledger.close()
    assert (seen, held_threads()) == ([{level.cgroup}], [])


def test_a_level_can_be_removed_and_added_again_while_the_kernel_waits_for_programs(kernel, ledger, grace, make_level):
    level = make_level(None)
    for bytes_ in (8 * MIB, 4 * MIB):
        ledger.set_limits([LevelLimits(level.cgroup, {0: bytes_})])
        assert (level.usage().limit, ledger.limit(level.cgroup, 0)) == (bytes_, bytes_)
        ledger.remove([level.cgroup])
        kernel.ledger.remove([level.cgroup])  # its own mapping of the page
        assert ledger.page_missing(level.cgroup)


def test_counts_of_a_removed_level_are_deleted_after_the_last_program(kernel, ledger, grace, level):
    late = Count(level.cgroup, 0, abi.Kind.MEMORY, abi.Reason.LIMIT)
    ledger.remove([level.cgroup])
    counters = bpf.pinned(kernel.pins / "maps/counters")
    key = _COUNTER_KEY.pack(late.cgroup, late.device, late.kind, late.reason)
    bpf.update(counters, key, (1).to_bytes(8, "little"))  # as a running program that already has its page does
    os.close(counters)
    assert late in ledger.counters()
    grace.set()
    for thread in held_threads():
        thread.join(PATIENCE_SECONDS)
    assert late not in ledger.counters()


def test_a_full_map_in_another_thread_is_reported(kernel, ledger, make_level):
    level, other, room = make_level(None), make_level(None), 10**12
    ledger.set_limits([LevelLimits(other.cgroup, {0: MIB})])  # now it has read which slots are free
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


def test_a_change_is_made_even_if_no_new_thread_can_start(kernel, make_level, monkeypatch):
    def refused(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    monkeypatch.setattr("fgpu_ebpf.ledger.map_in_map.MOST_THREADS", 1)  # so that each thread must release its slot
    level, seen = make_level(None), []
    with contextlib.closing(Ledger(kernel.pins)) as own:
        own.set_limits([LevelLimits(level.cgroup, {0: 8 * MIB})], seen.append)
    assert (level.usage().limit, seen) == (8 * MIB, [{level.cgroup}])


def test_a_change_waits_if_the_maximum_of_threads_is_waiting(monkeypatch):
    monkeypatch.setattr("fgpu_ebpf.ledger.map_in_map.MOST_THREADS", 3)
    entries, over = {}, threading.Event()

    def change(_, new):
        entries.update(new)
        over.wait(PATIENCE_SECONDS)

    monkeypatch.setattr(bpf, "lookup", lambda _, key, size: entries.get(key))
    monkeypatch.setattr(bpf, "update_all", change)
    graces = MapInMapUpdates()
    for n in range(3):
        graces.put(7, {bytes([n]): b"page"})
    late = threading.Thread(target=graces.put, args=(7, {b"late": b"page"}))
    late.start()
    assert (len(held_threads()), b"late" in entries) == (3, False)
    over.set()
    late.join(PATIENCE_SECONDS)
    graces.close()
    assert (b"late" in entries, held_threads()) == (True, [])


@pytest.fixture
def held_lookers(monkeypatch):
    """Simulate a kernel before Linux 6.8, where a lookup in a map of maps takes 20 ms. No caller may make a lookup."""

    def refusing(call, *kinds):
        def look(fd, *rest):
            assert bpf.form(fd).map_type not in kinds, "a lookup in a map of maps"
            return call(fd, *rest)

        return look

    monkeypatch.setattr(bpf, "HOLDS_LOOKERS", True)
    monkeypatch.setattr(bpf, "lookup", refusing(bpf.lookup, ARRAY_OF_MAPS, HASH_OF_MAPS))
    monkeypatch.setattr(bpf, "items", refusing(bpf.items, ARRAY_OF_MAPS))


def test_no_caller_makes_a_lookup_in_a_map_of_maps_on_a_kernel_with_slow_lookups(
    kernel, held_lookers, level, make_level, make_client
):
    one = make_client(level)
    one(f"alloc(0x1000, {4 * MIB})")
    other = make_level(None)
    with contextlib.closing(Ledger(kernel.pins)) as own:
        assert own.page_missing(other.cgroup)
        own.set_limits([LevelLimits(other.cgroup, {0: 64 * MIB})])
        assert not own.page_missing(other.cgroup)
        one(f"alloc(0x2000, {6 * MIB})")
        assert (level.used, own.usage(other.cgroup)[0].limit, other.used) == (10 * MIB, 64 * MIB, 0)
        own.remove([other.cgroup])
        assert (own.page_missing(other.cgroup), own.page_fd(other.cgroup)) == (True, None)


def test_several_changes_wait_at_the_same_time(monkeypatch, held_lookers, kernel, make_level):
    monkeypatch.setattr("fgpu_ebpf.ledger.map_in_map.MOST_THREADS", 3)
    together = threading.Barrier(3)

    def held(call):
        def change(fd, part):
            call(fd, part)
            together.wait(PATIENCE_SECONDS)

        return change

    levels, seen = [make_level(None) for _ in range(5)], []
    with contextlib.closing(Ledger(kernel.pins)) as own:
        for name in ("update_all", "delete_all"):
            monkeypatch.setattr(bpf, name, held(getattr(bpf, name)))
        own.set_limits([LevelLimits(level.cgroup, {0: 8 * MIB}) for level in levels], seen.append)
        assert [level.usage().limit for level in levels] == [8 * MIB] * 5
        own.remove([level.cgroup for level in levels])
        assert all(own.page_missing(level.cgroup) for level in levels)
    monkeypatch.undo()
    kernel.ledger.remove([level.cgroup for level in levels])
    assert seen == [{level.cgroup for level in levels}]


def test_a_change_fails_if_one_of_its_parts_fails(monkeypatch):
    monkeypatch.setattr(bpf, "HOLDS_LOOKERS", True)
    made, seen = [], []

    def change(_, part):
        if b"bad" in part:
            raise OSError(errno.E2BIG, "no room")
        made.extend(part)

    monkeypatch.setattr(bpf, "update_all", change)
    graces = MapInMapUpdates()
    with pytest.raises(OSError, match="no room"):
        graces.put(7, dict.fromkeys([b"one", b"bad", b"two"], b"page"), lambda: seen.append("over"))
    graces.close()
    assert (sorted(made), seen, held_threads()) == ([b"one", b"two"], [], [])


def test_a_ledger_that_is_closed_leaves_no_descriptor(kernel, make_level):
    level, before = make_level(None), len(os.listdir("/proc/self/fd"))
    with contextlib.closing(Ledger(kernel.pins)) as own:
        own.set_limits([LevelLimits(level.cgroup, {0: MIB})])
        own.remove([level.cgroup])
    assert len(os.listdir("/proc/self/fd")) == before
