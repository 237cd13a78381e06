"""Attacks by a tenant's own calls that try to have orphaned memory released while the device holds it. None works."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fgpu_ebpf.agent import ledger_corrections, nvml_reconcile
from fgpu_ebpf.agent.device_balance import CALM_LOOKS, LOOKS
from fgpu_ebpf.agent.nvml_reconcile import Reconciler
from fgpu_ebpf.driver import device_sample
from fgpu_ebpf.linux import procfs
from tests.unit.device_kit import Client, Handle, Managed, World
from tests.unit.ledger_kit import CONTEXT
from tests.unit.orphan_kit import MIB

GIB = 1024 * MIB
HELD = 8 * GIB
REST = 32 * MIB  # what the device holds besides


class Attack:
    """A tenant with exported memory that a descriptor keeps, and the reconcile thread."""

    def __init__(self) -> None:
        self.world = World(lambda: self.between())
        self.between: Callable[[], None] = lambda: None
        self.reconciler = Reconciler(self.world.nvml, self.world.ledger, lambda _: ())
        self.exporter = self.tenant()

    def tenant(self, has_context: bool = True) -> Client:
        client = self.world.begin()
        if has_context:
            list(self.world.make_context(client))
        return client

    def export_memory(self, bytes_: int = HELD) -> Handle:
        """Export memory of the exporter, and keep a descriptor open."""
        list(self.world.create(self.exporter, bytes_))
        handle = self.world.device.handles[-1]
        handle.is_exported, handle.descriptors = True, 1
        return handle

    def keep_memory(self, bytes_: int = HELD) -> Handle:
        """Leave memory that belongs to no process and that a descriptor keeps."""
        handle = self.export_memory(bytes_)
        list(self.world.release(self.exporter, handle))
        return handle

    def look(self, n: int = CALM_LOOKS + 1) -> None:
        for _ in range(n):
            self.reconciler.look(False)

    def escaped(self) -> int:
        """Return the bytes that tenants hold beyond what is charged."""
        return max(0, self.world.device.of_tenants() - self.world.ledger.total() - REST)


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Attack:
    found = Attack()
    monkeypatch.setattr(device_sample, "APART_SECONDS", 0)
    monkeypatch.setattr(procfs, "cgroup_path", lambda _: None)
    monkeypatch.setattr(ledger_corrections, "_is_alive", found.world.is_alive)
    monkeypatch.setattr(nvml_reconcile, "_alive", found.world.is_alive)
    return found


def test_without_an_attack_it_stays_and_goes_with_its_descriptor(attack: Attack) -> None:
    handle = attack.keep_memory()
    attack.look(LOOKS)
    assert attack.world.ledger.orphaned() == HELD
    handle.descriptors = 0
    attack.world.device.free_unused(handle)
    attack.look()
    assert attack.world.ledger.orphaned() == 0


def test_pool_bytes_that_are_admitted_and_not_taken(attack: Attack) -> None:
    """The process has no context, so it has no row."""
    attack.keep_memory()
    other = attack.tenant(has_context=False)
    attack.world.admit_pool(other, HELD)
    attack.look()
    attack.world.give_back_pool(other, HELD)
    attack.look()
    assert attack.escaped() == 0


def test_an_admission_that_no_call_follows(attack: Attack) -> None:
    attack.keep_memory()
    other = attack.tenant(has_context=False)
    admission = attack.world.admit(other, HELD)
    next(admission)
    attack.look()
    list(admission)
    attack.look()
    assert attack.escaped() == 0


def test_handles_that_a_library_only_claims_to_have_made(attack: Attack) -> None:
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


def test_handles_that_are_freed_and_then_only_claimed(attack: Attack) -> None:
    """It happens between two reconciliations, so that the charge does not change."""
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


def test_a_handle_that_is_given_up_by_a_process_that_has_more_than_it_is_charged(attack: Attack) -> None:
    """The memory stays in the call: its charge there and the memory that only the driver knows are different memory."""
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


def test_a_release_that_stands_still(attack: Attack) -> None:
    """Its thread is stopped after the driver has freed the memory, before the call returns."""
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


def test_a_create_that_stands_still_and_fails(attack: Attack) -> None:
    attack.keep_memory()
    other = attack.tenant(has_context=False)
    take = attack.world.take(other, HELD, False)
    next(take)
    attack.look()
    list(take)
    attack.look()
    assert attack.escaped() == 0


def test_contexts_that_a_library_only_claims_to_have_made(attack: Attack) -> None:
    """Each would explain the bytes that a driver needs for a context."""
    attack.keep_memory()
    attack.world.ledger.entries[attack.exporter.pid].contexts += 2000
    attack.look()
    assert attack.escaped() == 0


def test_a_free_of_managed_memory_that_stands_still(attack: Attack) -> None:
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


def test_the_end_of_a_context_with_managed_memory_that_stands_still(attack: Attack) -> None:
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


def test_an_export_between_the_look_at_orphans_and_the_look_at_processes(attack: Attack) -> None:
    """Managed memory that is charged and was never touched is not on the device."""
    list(attack.world.take_managed(attack.exporter, HELD))
    attack.look()
    attack.between = lambda: (setattr(attack, "between", lambda: None), attack.keep_memory())  # type: ignore[assignment]
    attack.look()
    list(attack.world.free_managed(attack.exporter, attack.exporter.managed[0]))
    attack.look()
    assert attack.escaped() == 0


def test_the_end_of_an_exporter_between_the_look_at_orphans_and_the_look_at_processes(attack: Attack) -> None:
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


def test_managed_memory_of_a_stranger_that_ends(attack: Attack) -> None:
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


def test_managed_memory_of_a_stranger_that_frees_it(attack: Attack) -> None:
    stranger = attack.world.begin(is_stranger=True)
    stranger.contexts = 1
    stranger.managed = [Managed(HELD, HELD)]
    attack.look(LOOKS + 1)
    attack.keep_memory()
    attack.look()
    stranger.managed = []
    attack.look(LOOKS + 1)
    assert attack.escaped() == 0


def test_a_stranger_s_managed_memory_is_not_taken_for_a_tenant_s(attack: Attack) -> None:
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


def test_memory_of_one_s_own_that_others_orphans_are_charged_for(attack: Attack) -> None:
    """A neighbour's process exits and the driver frees all it had, while this tenant's memory is kept."""
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


def test_admissions_that_end_with_their_process_beside_memory_that_nvml_names(attack: Attack) -> None:
    """A forked child keeps what an exited process had: its row proves that the device holds it."""
    doomed, kept = attack.tenant(), attack.tenant()
    list(attack.world.take(kept, HELD, True))
    next(attack.world.admit(doomed, HELD + CONTEXT))
    attack.world.end(doomed, 0, 1)
    attack.world.end(kept, 0, 1)
    attack.look(2 * CALM_LOOKS)
    assert attack.escaped() == 0


def test_memory_that_nvml_names_is_not_what_a_neighbour_s_process_had(attack: Attack) -> None:
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


def test_handles_of_a_process_whose_pid_an_ended_one_had(attack: Attack) -> None:
    """The row of the exited process proves nothing of them, because the later process has no context."""
    attack.world.end(attack.exporter, 0, 1)
    list(attack.world.create(attack.world.begin(attack.exporter.pid), HELD))
    attack.look()
    assert attack.escaped() == 0


def test_an_admission_of_a_process_whose_pid_an_ended_one_had(attack: Attack) -> None:
    """It becomes overhead, which ends with the last context. The row that it seemed to explain is another process's."""
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


def test_what_only_the_driver_knows_of_a_process_whose_pid_an_ended_one_had(attack: Attack) -> None:
    """The exited process had handles and no context: the row of its pid shows only memory of the later process."""
    other = attack.tenant(has_context=False)
    list(attack.world.create(other, HELD))
    attack.look()
    attack.world.end(other, 0, 1)
    later = attack.world.begin(other.pid)
    list(attack.world.make_context(later))
    later.grown = HELD
    attack.look()
    assert attack.escaped() == 0
