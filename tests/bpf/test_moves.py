"""Moves of a process to other levels, also during its charges and releases: no byte is lost or counted twice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.linux import bpf
from tests.bpf.conftest import MIB, Client, Kernel, Level, anomalies, assert_left, entries

STRAGGLER_SECONDS = 0.05


@pytest.fixture
def two(make_level: Callable[..., Level]) -> tuple[Level, Level]:
    return make_level(1024 * MIB), make_level(1024 * MIB)


def change(kernel: Kernel, client: Client, alter: Callable[[abi.Process], None]) -> None:
    """Change the process's entry as a BPF program does that still runs during a move."""
    fd, key = bpf.pinned(kernel.pins / "maps/processes"), client.pid.to_bytes(4, "little")
    try:
        process = abi.Process.from_buffer_copy(bpf.lookup(fd, key, bytes_of_process()) or b"")
        alter(process)
        bpf.update(fd, key, bytes(process))
    finally:
        os.close(fd)


def bytes_of_process() -> int:
    return len(bytes(abi.Process()))


def move(kernel: Kernel, client: Client, *levels: Level) -> None:
    """Move a process as the agent does, with the levels from the leaf outwards."""
    generation = client.entry(kernel).generation
    assert kernel.ledger.move(client.pid, generation, tuple(level.cgroup for level in levels))


def test_a_release_that_was_late_for_a_move_is_corrected(kernel, two, make_client):
    first, second = two
    one = make_client(first)
    one(f"alloc(0x1000, {4 * MIB})")
    one(f"alloc(0x2000, {6 * MIB})")
    move(kernel, one, second)
    assert not one.entry(kernel).late

    def release_late(process: abi.Process) -> None:  # it released from the first level, which had nothing left
        process.devices[0].bytes -= 4 * MIB
        process.devices[0].owed = 4 * MIB

    change(kernel, one, release_late)
    assert one.entry(kernel).late
    assert (first.used, second.used) == (0, 10 * MIB), "the late charge stays until the agent's correction"
    move(kernel, one, second)
    assert (first.used, second.used) == (0, 6 * MIB)
    assert not one.entry(kernel).late
    one("free(0x2000)")
    assert second.used == 0


def test_one_unmap_of_memory_from_before_and_after_a_move_leaves_no_entry_at_a_level(kernel, two, make_client):
    first, second = two
    one = make_client(first)
    one(f"create(4, {2 * MIB})")
    for i in range(1, 4):
        one(f"create({i}, {2 * MIB})")
        one(f"map_({0x100000000 + i * 2 * MIB}, {2 * MIB}, {i})")
        one(f"release({i})")
    move(kernel, one, second)
    for i in range(4, 8):
        if i > 4:
            one(f"create({i}, {2 * MIB})")
        one(f"map_({0x100000000 + i * 2 * MIB}, {2 * MIB}, {i})")
        one(f"release({i})")
    assert second.used == 14 * MIB
    one(f"unmap({0x100000000 + 2 * MIB}, {14 * MIB})")
    assert (first.used, second.used) == (0, 0)
    assert [entries(kernel, level) for level in two] == [0, 0]


def test_a_charge_that_was_late_for_a_move_is_corrected(kernel, two, make_client):
    first, second = two
    other, one = make_client(first), make_client(first)
    other(f"alloc(0x1000, {9 * MIB})")
    one(f"alloc(0x1000, {4 * MIB})")
    move(kernel, one, second)

    def charge_late(process: abi.Process) -> None:  # as if 3 of the 9 MiB at the first level were of this process
        process.devices[0].charged[(process.turn + 1) % 2] += 3 * MIB
        process.devices[0].bytes += 3 * MIB

    change(kernel, one, charge_late)
    assert one.entry(kernel).late
    move(kernel, one, second)
    assert (first.used, second.used) == (6 * MIB, 7 * MIB)
    one.kill()
    assert_left(second, 7 * MIB)
    assert (first.used, first.orphaned) == (6 * MIB, 0)


def test_a_charge_that_was_late_for_the_move_out_of_all_levels_is_released(kernel, two, make_client):
    first, _ = two
    other, one = make_client(first), make_client(first)
    other(f"alloc(0x1000, {9 * MIB})")
    one(f"alloc(0x1000, {4 * MIB})")
    generation = one.entry(kernel).generation
    move(kernel, one)

    def charge_late(process: abi.Process) -> None:
        process.devices[0].charged[(process.turn + 1) % 2] += 3 * MIB
        process.devices[0].bytes += 3 * MIB

    change(kernel, one, charge_late)
    assert first.used == 9 * MIB
    time.sleep(STRAGGLER_SECONDS)
    assert kernel.ledger.finish_move(one.pid, generation)
    assert (first.used, one.entry(kernel)) == (6 * MIB, None)


def test_a_process_that_ends_without_levels_leaves_no_orphan(kernel, two, make_client):
    first, _ = two
    one = make_client(first)
    one(f"alloc(0x1000, {4 * MIB})")
    move(kernel, one)
    assert one.entry(kernel).bytes[0] == 4 * MIB
    before = kernel.ledger.orphans.entries()
    one.kill()
    assert (kernel.ledger.orphans.entries(), first.used) == (before, 0)


def test_a_finished_move_changes_no_levels(kernel, two, make_client):
    first, second = two
    one = make_client(first)
    one(f"alloc(0x1000, {4 * MIB})")
    move(kernel, one, second)
    time.sleep(STRAGGLER_SECONDS)
    assert kernel.ledger.finish_move(one.pid, one.entry(kernel).generation)
    assert (one.entry(kernel).levels, first.used, second.used) == ((second.cgroup,), 0, 4 * MIB)


def test_a_process_that_ends_in_the_middle_of_a_move_leaves_orphans_at_both_levels(kernel, two, make_client):
    first, second = two
    other, one = make_client(first), make_client(first)
    other(f"alloc(0x1000, {9 * MIB})")
    one(f"alloc(0x1000, {4 * MIB})")
    move(kernel, one, second)

    def charge_late(process: abi.Process) -> None:
        process.devices[0].charged[(process.turn + 1) % 2] += 3 * MIB
        process.devices[0].bytes += 3 * MIB

    change(kernel, one, charge_late)
    one.kill()
    assert (first.used, first.orphaned) == (9 * MIB, 3 * MIB)
    assert first.let_go() == 3 * MIB
    assert_left(second, 4 * MIB)


def test_a_move_does_not_change_a_group_above_both_levels(kernel, make_level, make_client):
    group = make_level(100 * MIB)
    first, second = make_level(1024 * MIB, group), make_level(1024 * MIB, group)
    one = make_client(first)
    one(f"alloc(0x1000, {60 * MIB})")
    move(kernel, one, second, group)
    assert (first.used, second.used, group.used) == (0, 60 * MIB, 60 * MIB)
    assert group.usage().peak == 60 * MIB, "never counted twice"
    one("free(0x1000)")
    assert (second.used, group.used) == (0, 0)


def test_a_move_back_waits_for_late_charges(kernel, two, make_client):
    first, second = two
    before = anomalies(kernel)["RELEASE"]
    one = make_client(first)
    one(f"alloc(0x1000, {4 * MIB})")
    begun = time.monotonic()
    for _ in range(3):
        move(kernel, one, second)
        assert (first.used, second.used) == (0, 4 * MIB)
        move(kernel, one, first)
        assert (first.used, second.used) == (4 * MIB, 0)
    assert time.monotonic() - begun >= 5 * STRAGGLER_SECONDS
    one("free(0x1000)")
    assert first.used == 0
    assert anomalies(kernel)["RELEASE"] == before


def test_releases_follow_the_levels_that_were_charged(kernel, make_level, make_client, scale):
    """F5: a process is moved between cgroups, which are removed and created again, and limits are set after charges."""
    group = make_level(None)
    home = make_level(64 * MIB, group)
    one, strange = make_client(home), anomalies(kernel)["RELEASE"]
    empty = [make_level(64 * MIB)]
    for number in range(scale(100, 1000, 10_000)):
        one(f"alloc(0x1000, {4 * MIB})")
        if number % 10 == 0:
            (empty[0].path / "cgroup.procs").write_text(str(one.pid))  # the ledger gets no report of this move
        if number % 3 == 0:
            group.limit(64 * MIB)  # the limit is above the existing charge
        assert home.used == 4 * MIB
        assert one("free(0x1000)") == 0
        assert (home.used, empty[0].used) == (0, 0)
        assert not kernel.ledger.usage(group.cgroup) or group.used == 0
        kernel.ledger.remove([group.cgroup])
        if number % 10 == 0:
            (home.path / "cgroup.procs").write_text(str(one.pid))
            empty[0].path.rmdir()
            empty[0].path.mkdir()  # another cgroup of the same name
            kernel.ledger.remove([empty[0].cgroup])
            empty[0].cgroup = empty[0].path.stat().st_ino
            empty[0].limit(64 * MIB)
    assert anomalies(kernel)["RELEASE"] == strange
    one.kill()


def test_no_bytes_are_released_from_another_level_in_the_same_slot(kernel, make_level, make_client):
    """F5: a level is removed while a process of it holds memory, and another level gets its slot."""
    gone = make_level(64 * MIB)
    one = make_client(gone)
    one(f"alloc(0x1000, {4 * MIB})")
    kernel.ledger.remove([gone.cgroup])
    newcomer = make_level(64 * MIB)
    other = make_client(newcomer)
    other(f"alloc(0x1000, {6 * MIB})")
    one("free(0x1000)")
    assert newcomer.used == 6 * MIB
    one.kill()
    assert newcomer.used == 6 * MIB
    other("free(0x1000)")
    assert newcomer.used == 0
