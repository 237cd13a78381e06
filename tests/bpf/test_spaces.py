"""Processes that share an address space (vfork, clone with CLONE_VM) share the memory that one of them allocates."""

from __future__ import annotations

import pytest

from fgpu_ebpf import abi
from tests.bpf.conftest import MIB, Client, Kernel, Level, assert_left, entries, wait_until
from tests.bpf.spaces_kit import CLONE_FILES, CLONE_VFORK, CLONE_VM, borrowers, owners, reap


def has_space(kernel: Kernel, client: Client) -> bool:
    return client.pid in owners(kernel, "spaces", 8).values()


@pytest.fixture
def known(kernel: Kernel, client: Client) -> Client:
    """Return a process that has an entry."""
    client(f"alloc(0x1000, {MIB})")
    return client


def test_memory_of_a_vforked_child_is_charged_to_its_parent(kernel, level, known, start):
    child = start(known, CLONE_VM | CLONE_VFORK)
    child.order("a")
    wait_until(lambda: level.used == 5 * MIB)
    assert len(kernel.ledger.processes().keys() & set(cgroup_pids(level))) == 1
    child.order("x")
    assert known.process.stdout.readline(), "the parent did not continue after the child's exit"
    assert (level.used, level.orphaned, known.entry(kernel).bytes[0]) == (5 * MIB, 0, 5 * MIB)
    known("free(0x70000)")
    assert level.used == MIB
    assert borrowers(kernel) == {}


def cgroup_pids(level: Level) -> list[int]:
    return [int(pid) for pid in (level.path / "cgroup.procs").read_text().split()]


@pytest.mark.parametrize("flags", [CLONE_VM, CLONE_VM | CLONE_FILES])
def test_memory_of_a_child_with_the_same_address_space_is_charged_to_its_parent(kernel, level, known, start, flags):
    child = start(known, flags)
    child.order("a")
    wait_until(lambda: level.used == 5 * MIB)
    assert kernel.ledger.process(child.pid) is None
    assert borrowers(kernel) == {child.pid: known.pid}
    child.order("x")
    reap(known, child)
    assert (level.used, level.orphaned, borrowers(kernel)) == (5 * MIB, 0, {})
    assert entries(kernel, level, abi.Shared.PROCESSES) == 1
    wait_until(lambda: entries(kernel, level, abi.Shared.THREADS) == 1)
    known.kill()
    assert_left(level, 5 * MIB)


def test_a_child_with_a_copied_address_space_is_another_process(kernel, level, known, start):
    child = start(known, 0)
    child.order("a")
    wait_until(lambda: level.used == 5 * MIB)
    assert kernel.ledger.process(child.pid).bytes[0] == 4 * MIB
    child.order("x")
    reap(known, child)
    assert (level.used, level.orphaned) == (5 * MIB, 4 * MIB)


def test_a_child_that_executes_a_program_is_no_borrower_and_its_parent_stays_charged(kernel, level, known, start):
    child = start(known, CLONE_VM)
    child.order("a")
    wait_until(lambda: level.used == 5 * MIB)
    child.order("e")
    wait_until(lambda: borrowers(kernel) == {})
    assert (level.used, level.orphaned, known.entry(kernel).bytes[0]) == (5 * MIB, 0, 5 * MIB)
    known(f"os.kill({child.pid}, 9)")
    reap(known, child)
    assert (level.used, level.orphaned) == (5 * MIB, 0)


def test_a_child_in_another_level_is_charged_to_its_parent_s_level(kernel, level, known, start, make_level):
    """The memory belongs to the parent, also if the child has been moved to another level."""
    other, child = make_level(1024 * MIB), start(known, CLONE_VM)
    (other.path / "cgroup.procs").write_text(str(child.pid))
    child.order("a")
    wait_until(lambda: level.used == 5 * MIB)
    assert other.used == 0
    child.order("x")
    reap(known, child)
    assert (level.used, level.orphaned) == (5 * MIB, 0)


def test_memory_of_a_child_that_registers_is_charged_to_its_parent(kernel, level, known, start):
    child = start(known, CLONE_VM)
    assert kernel.ledger.enter(child.pid, (level.cgroup,))
    child.order("a")
    wait_until(lambda: level.used == 5 * MIB)
    assert (kernel.ledger.process(child.pid).bytes[0], known.entry(kernel).bytes[0]) == (0, 5 * MIB)
    known("free(0x70000)")
    assert level.used == MIB
    child.order("a")
    wait_until(lambda: level.used == 5 * MIB)
    child.order("x")
    reap(known, child)
    assert (level.used, level.orphaned, borrowers(kernel)) == (5 * MIB, 0, {})
    wait_until(lambda: entries(kernel, level, abi.Shared.THREADS) == 1)


def test_a_child_that_outlives_its_parent_is_charged_itself(kernel, level, known, start):
    child = start(known, CLONE_VM)
    child.order("a")
    wait_until(lambda: level.used == 5 * MIB)
    known.kill()
    assert (level.used, level.orphaned) == (5 * MIB, 5 * MIB)
    child.order("a")
    wait_until(lambda: level.used == 9 * MIB)
    assert kernel.ledger.process(child.pid).bytes[0] == 4 * MIB
    child.order("x")
    wait_until(lambda: level.held == 0)
    assert_left(level, 9 * MIB)


def test_a_child_releases_no_bytes_of_a_later_process_with_its_parent_s_pid(
    kernel, level, known, start, make_level, make_client
):
    other = make_level(1024 * MIB)
    child, tenant = start(known, CLONE_VM), make_client(other)
    child.order("a")
    wait_until(lambda: level.used == 5 * MIB)
    known.kill()
    for _ in range(50):
        if tenant(f"spawn({MIB}, {known.pid}, {8 * MIB})") == known.pid:
            break
        tenant("bury()")
        other.let_go()
    else:
        pytest.fail("the pid was not used again")
    child.order("r")
    child.order("a")
    wait_until(lambda: level.used == 9 * MIB)
    assert (other.used, other.orphaned) == (9 * MIB, 0)
    child.order("x")


def test_the_first_process_that_calls_is_charged_for_its_whole_address_space(kernel, level, client, start):
    child = start(client, CLONE_VM)
    child.order("a")
    wait_until(lambda: level.used == 4 * MIB)
    client(f"alloc(0x1000, {MIB})")
    assert client.entry(kernel) is None
    assert kernel.ledger.process(child.pid).bytes[0] == 5 * MIB
    child.order("x")
    reap(client, child)
    assert (level.used, level.orphaned) == (5 * MIB, 5 * MIB), "the device still holds this memory"
    client(f"alloc(0x2000, {2 * MIB})")
    assert (level.used, client.entry(kernel).bytes[0]) == (7 * MIB, 2 * MIB)


def test_a_reused_address_space_belongs_to_another_process(kernel, level, make_client):
    """The kernel soon reuses the address for another address space.

    The earlier process is not charged for that space.
    """
    for _ in range(20):
        one = make_client(level)
        one(f"alloc(0x1000, {MIB})")
        assert one.entry(kernel).bytes[0] == MIB
        assert has_space(kernel, one)
        one.kill()
        assert not has_space(kernel, one), "the entry stays, and would fill the map"
    assert_left(level, 20 * MIB)
    assert borrowers(kernel) == {}
