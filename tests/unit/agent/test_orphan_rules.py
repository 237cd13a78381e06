"""Rules of the release of orphaned memory: how many readings, in which order, and to which process a row belongs."""

from __future__ import annotations

import pytest

from fgpu_ebpf.agent import orphan_release
from fgpu_ebpf.agent.device_balance import CALM_LOOKS, LOOKS, Balance, Charges, Reading
from tests.unit.agent.attack_kit import HELD, Attack, attack_of
from tests.unit.agent.device_kit import Client
from tests.unit.agent.ledger_kit import CONTEXT
from tests.unit.orphan_kit import MIB


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Attack:
    return attack_of(monkeypatch)


# -- readings


def rooms(readings: list[tuple[int, bool]]) -> list[int | None]:
    """Return the results of readings, each with its upper bound and whether it is calm."""
    balance = Balance()
    return [balance.room(Reading(most, 0, calm), Charges()) for most, calm in readings]


def test_the_greatest_of_three_calm_readings_counts() -> None:
    assert rooms([(5, True), (1, True), (2, True), (2, True)]) == [None, None, 5, 2]


def test_the_greatest_of_25_readings_counts_if_a_process_changes_its_memory() -> None:
    assert rooms([(9, False)] + LOOKS * [(1, False)]) == [None] * (LOOKS - 1) + [9, 1]


def test_one_reading_with_a_change_among_the_last_three_makes_25_necessary() -> None:
    last = [(1, False), (1, True), (1, True)]
    assert rooms([(9, True)] + (LOOKS - 4) * [(1, True)] + last + [(1, True)])[-4:] == [None, None, 9, 1]


def test_a_gap_in_the_readings_starts_the_count_again() -> None:
    balance = Balance()
    for _ in range(CALM_LOOKS - 1):
        balance.room(Reading(1, 0, True), Charges())
    balance.forget()
    assert [balance.room(Reading(1, 0, True), Charges()) for _ in range(CALM_LOOKS)] == [None, None, 1]


# -- the order of releases


def orphans(attack: Attack) -> dict[int, int]:
    """Return the orphaned bytes by pid."""
    return {pid: orphan.bytes for (pid, _), orphan in attack.world.ledger.kept.items()}


@pytest.mark.parametrize("is_first", [True, False], ids=["before the fall", "after the fall"])
def test_memory_of_a_row_that_fell_is_released_before_a_younger_orphan(attack: Attack, is_first: bool) -> None:
    """The younger orphan is held. It is orphaned before the row falls, or before the release has enough readings."""
    neighbour = attack.tenant()
    list(attack.world.take(neighbour, HELD - CONTEXT, True))
    attack.look()
    attack.world.end(neighbour, 0, 0)
    attack.look()
    if is_first:
        attack.keep_memory()
        attack.look()
    attack.world.device.clean(neighbour)
    if not is_first:
        attack.look(1)
        attack.keep_memory()
    attack.look()
    assert orphans(attack) == {attack.exporter.pid: HELD}


def test_memory_of_a_process_that_nvml_lists_is_released_last(attack: Attack) -> None:
    """The process freed exported memory before it exited. A forked child keeps the rest of its memory."""
    neighbour = attack.tenant(has_context=False)
    list(attack.world.create(neighbour, HELD))
    attack.world.end(neighbour, 0, 0)
    attack.keep_memory()
    attack.world.end(attack.exporter, 0, 1)
    attack.look()
    attack.world.device.clean(neighbour)
    attack.look()
    assert orphans(attack) == {attack.exporter.pid: HELD + CONTEXT}


# -- rows


def test_a_row_of_a_later_process_that_no_probe_has_recorded_is_not_of_an_ended_process(attack: Attack) -> None:
    """The ended process had no context, so it had no row."""
    first = attack.tenant(has_context=False)
    list(attack.world.create(first, HELD))
    attack.world.end(first, 0, 1)
    attack.look(1)
    later_process(attack, first, HELD)
    attack.look(1)
    assert first.pid in attack.reconciler.truth.pids()


def test_the_rest_of_a_fallen_row_belongs_to_a_later_process_that_no_probe_has_recorded(attack: Attack) -> None:
    first = attack.tenant()
    list(attack.world.take(first, HELD, True))
    attack.world.end(first, 0, 1)
    attack.look(1)
    later_process(attack, first, HELD)
    attack.look(1)
    attack.world.device.clean(first)
    attack.look()
    assert first.pid in attack.reconciler.truth.pids()
    assert attack.world.ledger.orphaned() == 0


def later_process(attack: Attack, first: Client, bytes_: int) -> None:
    later = attack.world.begin(first.pid, is_stranger=True)
    later.contexts, later.plain = 1, [bytes_]


def test_slack_of_a_previous_program_is_charged_to_the_process(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML has one row for both programs. A forked child keeps the memory of the previous one."""
    list(attack.world.take(attack.exporter, HELD, True))
    attack.look()
    attack.world.end(attack.exporter, 0, 1)
    list(attack.world.make_context(attack.world.begin(attack.exporter.pid)))
    attack.look()
    with monkeypatch.context() as later:
        later.setattr(orphan_release, "SLACK_AFTER_NS", -1)
        attack.look()
    attack.look(1)
    assert attack.world.ledger.orphaned() < HELD + CONTEXT
    assert attack.world.ledger.total() == attack.world.device.of_tenants()


def test_released_bytes_hide_no_bytes_that_are_orphaned_next(attack: Attack) -> None:
    """The later process has the pid of the first. It exits just after the memory of the first was released."""
    first = attack.tenant(has_context=False)
    list(attack.world.create(first, HELD))
    attack.world.end(first, 0, 0)
    later = attack.world.begin(first.pid)
    list(attack.world.make_context(later))
    list(attack.world.take(later, HELD, True))
    attack.look()
    attack.world.device.clean(first)
    while attack.world.ledger.orphaned():
        attack.look(1)
    attack.world.end(later, 0, 1)
    attack.look()
    assert attack.escaped() == 0


def test_the_end_of_a_context_reduces_no_charge_for_memory_of_a_previous_program(attack: Attack) -> None:
    """The overhead that ends with the context has bytes that were admitted without a call."""
    list(attack.world.take(attack.exporter, HELD, True))
    attack.look()
    attack.world.end(attack.exporter, 0, 1)
    later = attack.world.begin(attack.exporter.pid)
    list(attack.world.make_context(later))
    list(attack.world.admit(later, HELD))
    attack.look()
    list(attack.world.end_context(later))
    assert attack.escaped() == 0


# -- memory in no row


def test_several_contexts_of_a_process_keep_no_orphan(attack: Attack) -> None:
    for _ in range(9):
        list(attack.world.make_context(attack.exporter))
    attack.look()
    neighbour = attack.tenant()
    attack.world.end(neighbour, 0, 0)
    attack.world.device.clean(neighbour)
    attack.look()
    assert attack.world.ledger.orphaned() == 0


def test_handles_that_exist_during_one_pass_only_release_no_orphan(attack: Attack) -> None:
    """The exporter's managed memory was never touched, so none of it is on the device."""
    list(attack.world.take_managed(attack.exporter, HELD))
    attack.keep_memory()
    attack.look()
    other = attack.tenant(has_context=False)
    reads = [lambda: None, lambda: list(attack.world.create(other, HELD))]  # before the processes, before the rows
    attack.between = lambda: reads.pop(0)() if reads else None
    attack.look(1)
    list(attack.world.release(other, attack.world.device.handles[-1]))
    attack.look()
    list(attack.world.free_managed(attack.exporter, attack.exporter.managed[0]))
    attack.look()
    assert attack.escaped() == 0


def test_handles_beside_a_context_that_no_probe_has_recorded_release_no_orphan(attack: Attack) -> None:
    """NVML shows the handles, because the process has a context."""
    other = attack.tenant(has_context=False)
    list(attack.world.create(other, HELD))
    other.contexts = 1
    attack.keep_memory()
    attack.look()
    assert attack.escaped() == 0


def test_managed_memory_that_is_freed_leaves_no_estimate(attack: Attack) -> None:
    """The driver allocates more for managed memory than the process asks for. It frees all of it at once."""
    list(attack.world.take_managed(attack.exporter, HELD))
    managed = attack.exporter.managed[0]
    managed.resident = HELD + 100 * MIB
    attack.look()
    attack.keep_memory(100 * MIB)
    attack.look()
    list(attack.world.free_managed(attack.exporter, managed))
    attack.look()
    assert attack.escaped() == 0


def test_a_chunk_of_managed_memory_keeps_no_orphan(attack: Attack) -> None:
    list(attack.world.take_managed(attack.exporter, HELD))
    attack.exporter.managed[0].resident = HELD + 100 * MIB
    attack.look()
    handle = attack.keep_memory(100 * MIB)
    handle.descriptors = 0
    attack.world.device.free_unused(handle)
    attack.look()
    assert attack.world.ledger.orphaned() == 0
