"""A tenant tries by its own calls to have orphaned memory released while the device holds it. No attempt succeeds."""

from __future__ import annotations

import pytest

from fgpu_ebpf.agent.device_balance import CALM_LOOKS, LOOKS
from tests.unit.agent.attack_kit import HELD, Attack, attack_of
from tests.unit.agent.device_kit import Managed
from tests.unit.agent.ledger_kit import CONTEXT


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Attack:
    return attack_of(monkeypatch)


def test_without_an_attack_an_orphan_stays_until_its_descriptor_is_closed(attack: Attack) -> None:
    handle = attack.keep_memory()
    attack.look(LOOKS)
    assert attack.world.ledger.orphaned() == HELD
    handle.descriptors = 0
    attack.world.device.free_unused(handle)
    attack.look()
    assert attack.world.ledger.orphaned() == 0


def test_admitted_and_unallocated_pool_bytes_release_no_orphan(attack: Attack) -> None:
    """The process has no context, so it has no row."""
    attack.keep_memory()
    other = attack.tenant(has_context=False)
    attack.world.admit_pool(other, HELD)
    attack.look()
    attack.world.give_back_pool(other, HELD)
    attack.look()
    assert attack.escaped() == 0


def test_an_admission_without_a_call_releases_no_orphan(attack: Attack) -> None:
    attack.keep_memory()
    other = attack.tenant(has_context=False)
    admission = attack.world.admit(other, HELD)
    next(admission)
    attack.look()
    list(admission)
    attack.look()
    assert attack.escaped() == 0


def test_handles_that_a_library_falsely_reports_release_no_orphan(attack: Attack) -> None:
    """The process has no context, so it has no row."""
    attack.keep_memory()
    other = attack.tenant(has_context=False)
    entry = attack.world.ledger.entries[other.pid]
    entry.charge(HELD)
    entry.vmm += HELD
    attack.look()
    entry.bytes, entry.vmm = 0, 0
    attack.look()
    assert attack.escaped() == 0


def test_freed_handles_that_a_library_reports_again_release_no_orphan(attack: Attack) -> None:
    """The free and the report happen between two reconciliations, so the charge does not change."""
    other = attack.tenant(has_context=False)
    list(attack.world.create(other, HELD))
    attack.look()
    attack.keep_memory()
    attack.look()
    list(attack.world.release(other, next(one for one in attack.world.device.handles if one.maker is other)))
    entry = attack.world.ledger.entries[other.pid]
    entry.charge(HELD)
    entry.vmm += HELD
    entry.begun, entry.changes = entry.begun + 1, entry.changes + 1
    attack.look()
    entry.bytes, entry.vmm = 0, 0
    attack.look()
    assert attack.escaped() == 0


def test_a_handle_released_by_an_undercharged_process_releases_no_orphan(attack: Attack) -> None:
    """The call has not returned, so the handle is still charged.

    This charge must not be taken for the uncharged memory of stacks and modules, which has the same size.
    """
    other = attack.tenant()
    list(attack.world.take_managed(other, HELD))
    handle = attack.export_memory()
    attack.look()
    release = attack.world.release(attack.exporter, handle)
    next(release), next(release)
    attack.exporter.grown = HELD
    attack.look()
    list(release)
    attack.look()
    list(attack.world.free_managed(other, other.managed[0]))
    attack.look()
    assert attack.escaped() == 0


def test_a_stopped_release_releases_no_orphan(attack: Attack) -> None:
    """The thread is stopped in the call, after the driver has freed the memory."""
    attack.keep_memory()
    other = attack.tenant(has_context=False)
    list(attack.world.create(other, HELD))
    attack.look()
    release = attack.world.release(other, attack.world.device.handles[-1])
    next(release), next(release)
    attack.look()
    list(release)
    attack.look()
    assert attack.escaped() == 0


def test_a_stopped_create_that_fails_releases_no_orphan(attack: Attack) -> None:
    attack.keep_memory()
    other = attack.tenant(has_context=False)
    take = attack.world.take(other, HELD, False)
    next(take)
    attack.look()
    list(take)
    attack.look()
    assert attack.escaped() == 0


def test_contexts_that_a_library_falsely_reports_release_no_orphan(attack: Attack) -> None:
    """Each reported context would explain CONTEXT_REST_BYTES of the bytes in use."""
    attack.keep_memory()
    attack.world.ledger.entries[attack.exporter.pid].contexts += 2000
    attack.look()
    assert attack.escaped() == 0


def test_a_stopped_free_of_managed_memory_releases_no_orphan(attack: Attack) -> None:
    list(attack.world.take_managed(attack.exporter, HELD))
    managed = attack.exporter.managed[0]
    managed.resident = HELD
    attack.look()
    attack.keep_memory()
    attack.look()
    free = attack.world.free_managed(attack.exporter, managed)
    next(free), next(free)
    attack.look()
    list(free)
    attack.look()
    assert attack.escaped() == 0


def test_a_stopped_end_of_a_context_with_managed_memory_releases_no_orphan(attack: Attack) -> None:
    other = attack.tenant()
    list(attack.world.take_managed(other, HELD))
    other.managed[0].resident = HELD
    attack.look()
    attack.keep_memory()
    attack.look()
    end = attack.world.end_context(other)
    next(end), next(end)
    attack.look()
    list(end)
    attack.look()
    assert attack.escaped() == 0


def test_an_export_between_the_reads_of_orphans_and_processes_releases_no_orphan(attack: Attack) -> None:
    """Managed memory that is charged and was never touched is not on the device."""
    list(attack.world.take_managed(attack.exporter, HELD))
    attack.look()
    attack.between = lambda: (setattr(attack, "between", lambda: None), attack.keep_memory())  # type: ignore[assignment]
    attack.look()
    list(attack.world.free_managed(attack.exporter, attack.exporter.managed[0]))
    attack.look()
    assert attack.escaped() == 0


def test_an_exporter_s_exit_between_the_reads_of_orphans_and_processes_releases_no_orphan(attack: Attack) -> None:
    other = attack.tenant()
    list(attack.world.take_managed(other, HELD))
    attack.export_memory()
    attack.look()

    def end() -> None:
        attack.between = lambda: None
        attack.world.end(attack.exporter, 0, 0)
        attack.world.device.clean(attack.exporter)

    attack.between = end
    attack.look()
    list(attack.world.free_managed(other, other.managed[0]))
    attack.look()
    assert attack.escaped() == 0


def test_managed_memory_of_an_exiting_unmanaged_process_releases_no_orphan(attack: Attack) -> None:
    """The process is in no managed cgroup."""
    stranger = attack.world.begin(is_stranger=True)
    stranger.contexts, stranger.grown = 1, 0
    stranger.managed = [Managed(HELD, HELD)]
    attack.look(LOOKS + 1)
    attack.keep_memory()
    attack.look()
    attack.world.device.clean(stranger)
    attack.look(LOOKS + 1)
    assert attack.escaped() == 0


def test_managed_memory_freed_by_an_unmanaged_process_releases_no_orphan(attack: Attack) -> None:
    stranger = attack.world.begin(is_stranger=True)
    stranger.contexts = 1
    stranger.managed = [Managed(HELD, HELD)]
    attack.look(LOOKS + 1)
    attack.keep_memory()
    attack.look()
    stranger.managed = []
    attack.look(LOOKS + 1)
    assert attack.escaped() == 0


def test_managed_memory_of_a_tenant_and_an_unmanaged_process_releases_no_orphan(attack: Attack) -> None:
    list(attack.world.take_managed(attack.exporter, HELD))
    stranger = attack.world.begin(is_stranger=True)
    stranger.contexts = 1
    stranger.managed = [Managed(HELD, HELD)]
    attack.look()
    attack.keep_memory()
    attack.look()
    attack.world.device.clean(stranger)
    attack.look()
    list(attack.world.free_managed(attack.exporter, attack.exporter.managed[0]))
    attack.look()
    assert attack.escaped() == 0


def test_the_release_of_a_neighbour_s_orphan_releases_no_kept_orphan(attack: Attack) -> None:
    """A neighbour's process exits and the driver frees all its memory, while this tenant's memory is kept."""
    attack.keep_memory()
    neighbour = attack.tenant()
    list(attack.world.take(neighbour, HELD, True))
    attack.look()
    attack.world.end(neighbour, 0, 0)
    attack.look()
    attack.world.device.clean(neighbour)
    attack.look()
    kept = {pid: orphan.bytes for (pid, _), orphan in attack.world.ledger.kept.items()}
    assert kept == {attack.exporter.pid: HELD}


def test_admissions_of_an_exited_process_beside_a_row_of_nvml_release_no_orphan(attack: Attack) -> None:
    """A forked child keeps memory of an exited process. The child's row proves that the device holds it."""
    doomed, kept = attack.tenant(), attack.tenant()
    list(attack.world.take(kept, HELD, True))
    next(attack.world.admit(doomed, HELD + CONTEXT))
    attack.world.end(doomed, 0, 1)
    attack.world.end(kept, 0, 1)
    attack.look(2 * CALM_LOOKS)
    assert attack.escaped() == 0


def test_a_row_of_nvml_keeps_only_the_orphan_of_its_own_process(attack: Attack) -> None:
    """The neighbour's older process has no row. Its memory is freed, and both orphans are of equal size."""
    kept, neighbour = attack.tenant(), attack.tenant(has_context=False)
    list(attack.world.create(neighbour, HELD))
    list(attack.world.take(kept, HELD, True))
    attack.world.end(neighbour, 0, 0)
    attack.world.end(kept, 0, 1)
    attack.look()
    attack.world.device.clean(neighbour)
    attack.look()
    assert {pid for pid, _ in attack.world.ledger.kept} == {kept.pid}


def test_handles_of_a_process_with_a_reused_pid_release_no_orphan(attack: Attack) -> None:
    """The row of the exited process proves nothing about these handles, because the later process has no context."""
    attack.world.end(attack.exporter, 0, 1)
    list(attack.world.create(attack.world.begin(attack.exporter.pid), HELD))
    attack.look()
    assert attack.escaped() == 0


def test_an_admission_of_a_process_with_a_reused_pid_releases_no_orphan(attack: Attack) -> None:
    """The admission becomes overhead, which ends with the last context.

    The row that seemed to explain it belongs to another process.
    """
    list(attack.world.take(attack.exporter, HELD, True))
    attack.look()
    attack.world.end(attack.exporter, 0, 1)
    later = attack.world.begin(attack.exporter.pid)
    list(attack.world.make_context(later))
    list(attack.world.admit(later, HELD))
    attack.look()
    list(attack.world.end_context(later))
    attack.look()
    assert attack.escaped() == 0


def test_driver_memory_of_a_process_with_a_reused_pid_releases_no_orphan(attack: Attack) -> None:
    """The exited process had handles and no context. The row of its pid shows only memory of the later process."""
    other = attack.tenant(has_context=False)
    list(attack.world.create(other, HELD))
    attack.look()
    attack.world.end(other, 0, 1)
    later = attack.world.begin(other.pid)
    list(attack.world.make_context(later))
    later.grown = HELD
    attack.look()
    assert attack.escaped() == 0
