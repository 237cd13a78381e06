"""Parked processes: their bytes leave the levels around their own, which stays charged, until they are woken."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from fgpu_ebpf.ledger.parked import Life
from tests.bpf.conftest import MIB, Client, Kernel, Level, anomalies, page_of, wait_until
from tests.bpf.test_moves import move

Family = tuple[Level, Level, Level]


@pytest.fixture
def family(make_level: Callable[..., Level]) -> Family:
    """Return a group of 100 MiB and two tenants in it with 80 MiB each."""
    group = make_level(100 * MIB)
    return group, make_level(80 * MIB, group), make_level(80 * MIB, group)


def life_of(kernel: Kernel, client: Client) -> Life:
    return client.pid, client.entry(kernel).generation


def park(kernel: Kernel, client: Client) -> Life:
    life = life_of(kernel, client)
    assert kernel.ledger.parked.begin(life) == 0
    assert kernel.ledger.parked.park(life) == 0
    return life


def charges(level: Level) -> tuple[int, int]:
    """Return the bytes of a level on the device and its parked bytes, in MiB."""
    usage = level.usage()
    return usage.used // MIB, usage.parked // MIB


def test_a_parked_process_frees_the_group_and_keeps_the_room_of_its_tenant(
    kernel: Kernel, family: Family, make_client: Callable[..., Client]
) -> None:
    group, one, other = family
    first, second, third = make_client(one), make_client(one), make_client(other)
    first(f"alloc(0x1000, {60 * MIB})")
    life = park(kernel, first)
    assert (charges(one), charges(group)) == ((0, 60), (0, 0))
    assert page_of(kernel, one).devices[0].used == 60 * MIB, "views from inside do not change"
    assert second(f"admit({21 * MIB})") == 0, "the room of the parked process is kept"
    assert second(f"admit({20 * MIB})") == 1
    assert third(f"admit({80 * MIB})") == 1, "the group is not charged for the parked process"
    assert kernel.ledger.parked.wake(life) == errno.ENOSPC
    assert (charges(one), charges(group)) == ((20, 60), (100, 0))
    third.kill()
    wait_until(lambda: other.held == 0)
    other.let_go()
    assert kernel.ledger.parked.wake(life) == 0
    assert kernel.ledger.parked.end(life) == 0
    assert (charges(one), charges(group)) == ((80, 0), (80, 0))
    first("free(0x1000)")
    assert (charges(one), charges(group)) == ((20, 0), (20, 0))


def test_the_entry_of_a_parked_process_shows_its_bytes_as_parked(kernel: Kernel, client: Client) -> None:
    client(f"alloc(0x1000, {60 * MIB})")
    life = park(kernel, client)
    entry = client.entry(kernel)
    assert (entry.is_parked, entry.bytes[0], entry.parked[0]) == (True, 0, 60 * MIB)
    assert kernel.ledger.parked.entries()[life].bytes[0] == 60 * MIB
    assert client(f"admit({5 * MIB})") == 1
    entry = client.entry(kernel)
    assert (entry.bytes[0], entry.parked[0]) == (5 * MIB, 60 * MIB)
    assert kernel.ledger.parked.wake(life) == kernel.ledger.parked.end(life) == 0
    entry = client.entry(kernel)
    assert (entry.is_parked, entry.bytes[0], entry.parked[0]) == (False, 65 * MIB, 0)
    assert life not in kernel.ledger.parked.entries()


def test_parked_bytes_go_with_their_process_and_are_not_orphaned(
    kernel: Kernel, family: Family, make_client: Callable[..., Client]
) -> None:
    group, one, _ = family
    client = make_client(one)
    client(f"alloc(0x1000, {60 * MIB})")
    life = park(kernel, client)
    client.kill()
    wait_until(lambda: page_of(kernel, one).devices[0].used == 0)
    assert (charges(one), charges(group), one.orphaned, group.orphaned) == ((0, 0), (0, 0), 0, 0)
    assert life not in kernel.ledger.parked.entries()
    assert kernel.ledger.parked.wake(life) == errno.ESRCH


def test_a_process_that_ends_while_it_wakes_up_leaves_its_bytes_charged(
    kernel: Kernel, family: Family, make_client: Callable[..., Client]
) -> None:
    group, one, _ = family
    client = make_client(one)
    client(f"alloc(0x1000, {60 * MIB})")
    life = park(kernel, client)
    assert kernel.ledger.parked.wake(life) == 0
    client.kill()
    wait_until(lambda: one.orphaned == 60 * MIB)
    assert (one.used, group.used) == (60 * MIB, 60 * MIB)
    assert life not in kernel.ledger.parked.entries()


def test_a_parked_process_that_executes_a_program_has_nothing(kernel: Kernel, client: Client, level: Level) -> None:
    client(f"alloc(0x1000, {60 * MIB})")
    park(kernel, client)
    client.send("os.execv(sys.executable, [sys.executable, *sys.argv])")
    client.begin(0)
    assert (page_of(kernel, level).devices[0].used, level.orphaned) == (0, 0)
    assert not any(tgid == client.pid for tgid, _ in kernel.ledger.parked.entries())


def test_an_entry_with_bytes_is_not_deleted(kernel: Kernel, client: Client) -> None:
    client(f"alloc(0x1000, {60 * MIB})")
    life = park(kernel, client)
    assert kernel.ledger.parked.end(life) == errno.EBUSY
    assert kernel.ledger.parked.begin(life) == 0, "a second agent begins again"
    assert kernel.ledger.parked.park(life) == 0
    assert kernel.ledger.parked.entries()[life].bytes[0] == 60 * MIB


def test_the_levels_of_a_parked_process_do_not_change(
    kernel: Kernel, family: Family, make_client: Callable[..., Client]
) -> None:
    group, one, other = family
    client = make_client(one)
    client(f"alloc(0x1000, {60 * MIB})")
    life = park(kernel, client)
    generation, levels = client.entry(kernel).generation, (other.cgroup, group.cgroup)
    for to in (levels, (group.cgroup,), ()):
        assert not kernel.ledger.move(client.pid, generation, to)
    assert client.pid in kernel.ledger.parked.unmoved
    assert (client.entry(kernel).levels, page_of(kernel, one).held) == ((one.cgroup, group.cgroup), 1)
    assert (charges(one), charges(other), charges(group)) == ((0, 60), (0, 0), (0, 0))
    assert kernel.ledger.parked.wake(life) == kernel.ledger.parked.end(life) == 0
    move(kernel, client, other, group)
    assert (charges(one), charges(other), charges(group)) == ((0, 0), (60, 0), (60, 0))
    kernel.ledger.parked.unmoved.discard(client.pid)


def test_a_release_of_a_parked_process_is_settled_when_it_runs_again(
    kernel: Kernel, client: Client, level: Level
) -> None:
    before = anomalies(kernel)
    assert client(f"admit({60 * MIB}, 1)") == 1
    life = park(kernel, client)
    client(f"give_back({20 * MIB})")
    entry = client.entry(kernel)
    assert (entry.parked[0], charges(level)) == (60 * MIB, (0, 60)), "the release counts when the process runs again"
    move(kernel, client, level)
    assert kernel.ledger.parked.wake(life) == kernel.ledger.parked.end(life) == 0
    assert client.entry(kernel).late
    move(kernel, client, level)
    assert (charges(level), client.entry(kernel).bytes[0]) == ((40, 0), 40 * MIB)
    assert anomalies(kernel) == before


def test_a_reading_from_before_a_process_was_parked_corrects_nothing(
    kernel: Kernel, client: Client, level: Level
) -> None:
    client(f"alloc(0x1000, {60 * MIB})")
    before = client.entry(kernel)
    park(kernel, client)
    assert not kernel.ledger.overhead(client.pid, before.generation, 0, 7 * MIB, before.changes)
