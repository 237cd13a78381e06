"""F37: the charges of another layout's levels are entered in this ledger, and the other ledger admits no more."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.driver import other_layouts
from fgpu_ebpf.driver.other_layouts import carry_over
from fgpu_ebpf.driver.programs import ProgramError
from fgpu_ebpf.ledger.level_limits import LevelLimits
from tests.bpf.conftest import MIB, REPOSITORY, Client, Kernel, Level, loaded, page_of

REFUSED, ADMITTED = 0, 1


@dataclass
class Held:
    """A level of the other ledger, with a process that holds 60 of its 100 MiB."""

    level: Level
    client: Client


@pytest.fixture(scope="module")
def other(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Load programs that are pinned elsewhere, with their own driver and shim."""
    folder = tmp_path_factory.mktemp("other")
    shim = folder / "libfgpu.so"
    shutil.copy(REPOSITORY / "build/shim/libfgpu.so", shim)
    with loaded(folder, REPOSITORY / "bpf", shim) as other:
        yield other


@pytest.fixture
def held(kernel: Kernel, other: Kernel) -> Iterator[Held]:
    level = Level(other, 100 * MIB)
    client = Client(other, level)
    assert client(f"admit({60 * MIB})") == ADMITTED
    client(f"alloc(0x1000, {60 * MIB})")
    yield Held(level, client)
    client.kill()
    level.remove()
    kernel.ledger.remove([level.cgroup])


def test_charges_of_another_layout_are_entered_and_its_ledger_admits_no_more(
    kernel: Kernel, other: Kernel, held: Held
) -> None:
    for _ in range(2):  # a start that was killed half-way is repeated
        carry_over(other.pins, abi.LAYOUT, kernel.ledger)
        (usage,) = kernel.ledger.usage(held.level.cgroup, (0,)) or ()
        assert (usage.limit, usage.used, usage.orphaned) == (100 * MIB, 60 * MIB, 60 * MIB)
    assert held.client("admit(1)") is None
    held.client("free(0x1000)")
    assert held.level.used == 60 * MIB, "the other ledger's programs still record calls"
    assert kernel.ledger.orphans.disown(held.level.cgroup, 0, 60 * MIB)


def test_an_uncommitted_limit_of_another_layout_stays_uncommitted_without_the_kill_flag(
    kernel: Kernel, other: Kernel, held: Held
) -> None:
    flags, first = abi.LimitFlag.OBSERVE | abi.LimitFlag.KILL, frozenset({1})
    other.ledger.set_limits([LevelLimits(held.level.cgroup, {0: MIB, 1: MIB}, flags, uncommitted=first)])
    carry_over(other.pins, abi.LAYOUT, kernel.ledger)
    assert page_of(kernel, held.level).flags == abi.LimitFlag.OBSERVE | abi.uncommitted(1)
    found = {
        device: (bytes_, said) for cgroup, device, bytes_, said in kernel.ledger.limits() if cgroup == held.level.cgroup
    }
    assert found == {0: (MIB, abi.LimitFlag.OBSERVE), 1: (MIB, abi.LimitFlag.OBSERVE | abi.uncommitted(1))}


def test_the_part_of_a_limit_that_views_do_not_show_is_carried_over(kernel: Kernel, other: Kernel, held: Held) -> None:
    other.ledger.set_limits([LevelLimits(held.level.cgroup, {0: 9 * MIB, 1: MIB}, outside={0: 8 * MIB})])
    carry_over(other.pins, abi.LAYOUT, kernel.ledger)
    assert list(page_of(kernel, held.level).outside[:2]) == [8 * MIB, 0]


def test_parked_processes_of_another_layout_are_found(
    other: Kernel, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_layouts, "folders", lambda _: [other.pins])
    life = held.client.pid, other.ledger.processes()[held.client.pid].generation
    assert other_layouts.parked(other.pins) == ""
    assert other.ledger.parked.begin(life) == 0
    assert f"(1 in {other.pins})" in other_layouts.parked(other.pins)
    assert other.ledger.parked.end(life) == 0


def test_a_level_that_is_being_removed_is_left_out(kernel: Kernel, other: Kernel, held: Held) -> None:
    assert other.ledger._run(abi.Adjust.WITHDRAW, held.level.cgroup) == 0
    carry_over(other.pins, abi.LAYOUT, kernel.ledger)
    assert kernel.ledger.page_missing(held.level.cgroup)


def test_limits_of_an_unreadable_layout_stay_in_force(kernel: Kernel, other: Kernel, held: Held) -> None:
    with pytest.raises(ProgramError, match="stay in force"):
        carry_over(other.pins, abi.LAYOUT + 1, kernel.ledger)
    assert kernel.ledger.page_missing(held.level.cgroup)
    assert held.client(f"admit({41 * MIB})") == REFUSED
    assert held.client(f"admit({40 * MIB})") == ADMITTED
