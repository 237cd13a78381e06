"""Tests of the audit: which tenants run outside their turns, according to NVML and to the counts of turns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.agent.turn_audit import Audit, Verdict
from fgpu_ebpf.ledger.compute_maps import TurnCounts

HONEST, LIAR = (7, 0), (8, 0)
PROCESSES = {
    71: SimpleNamespace(levels=(7, 1), contexts=(1,)),
    81: SimpleNamespace(levels=(8, 1), contexts=(1,)),
    82: SimpleNamespace(levels=(8,), contexts=(0,)),
}


class Host:
    """Two tenants with half of the device each. `percent` is the utilization that NVML reports."""

    def __init__(self, percent):
        self.percent, self.now, self.free = percent, 1000.0, 0
        self.silent, self.part, self.unowned = False, 0.5, 0
        self.audit, self.processes = Audit(), PROCESSES
        self.shared, self.told = lambda: {HONEST, LIAR}, {HONEST, LIAR}
        self.ran = dict.fromkeys((HONEST, LIAR), 0)

    def add_ran(self, level, device, ns):
        self.ran[level, device] = self.ran.get((level, device), 0) + ns

    def looks(self, number):
        for _ in range(number):
            self.now += 1.0
            counts = TurnCounts(owned_ns=int((self.now * self.part - self.unowned) * 1e9), free=self.free)
            told = dict.fromkeys({HONEST} if self.silent else self.told, counts)
            self.turns = lambda told=told: told
            said = self.audit.look(self.now, {0: self.percent}, self, self.processes)
        return said


def test_a_tenant_that_runs_outside_its_turns_is_found_after_ten_seconds():
    host = Host({71: 48, 81: 60, 82: 35, 99: 100})
    assert host.looks(10) == Verdict()
    assert host.looks(1).beyond == pytest.approx({HONEST: -0.02, LIAR: 0.45})
    assert host.looks(1).outside == {81, 82}
    host.percent = {71: 48, 82: 50}
    assert host.looks(10).outside == set()


def test_a_process_with_a_context_is_reported_if_its_tenant_owns_much_time_and_runs_nothing():
    host = Host({71: 48})
    assert host.looks(10).empty == set()
    assert host.looks(1).empty == {81}
    host.percent = {71: 48, 81: 3}
    assert host.looks(10).empty == set(), "a tenant that runs little is not idle"


def test_all_processes_with_the_shim_are_reported_if_none_of_their_tenant_has_a_context_on_the_device():
    """Turns are owned by a report alone. A process without the shim reports nothing, so it takes no turns."""
    host = Host({71: 48})
    host.processes = {
        71: PROCESSES[71],
        82: SimpleNamespace(levels=(8, 1), contexts=(0,), flags=int(abi.Seen.SHIM)),
        83: SimpleNamespace(levels=(8,), contexts=(0,), flags=0),
    }
    assert host.looks(11).empty == {82}


def test_empty_turns_of_a_tenant_are_not_reported_of_the_other_tenants_of_its_group():
    """A group owns the turns of its tenants."""
    host = Host({})
    host.shared = lambda: {LIAR, (9, 0), (1, 0)}
    host.processes = {
        82: SimpleNamespace(levels=(8, 1), contexts=(0, 0), flags=int(abi.Seen.SHIM)),
        90: SimpleNamespace(levels=(9, 1), contexts=(0, 1), flags=int(abi.Seen.SHIM)),
        91: SimpleNamespace(levels=(1,), contexts=(0, 0), flags=int(abi.Seen.SHIM)),
    }
    host.told = {LIAR, (1, 0)}
    assert host.looks(11).empty == {82, 91}
    host.processes = {pid: host.processes[pid] for pid in (82, 90)}
    assert host.looks(1).empty == {82}


def test_a_tenant_that_owns_little_time_and_runs_nothing_is_not_reported():
    host = Host({71: 48})
    host.part = 0.05
    assert host.looks(11).empty == set()


def test_each_run_of_the_audit_after_the_first_reports_at_most_2_s_of_running_time_to_the_gatekeeper():
    host = Host({71: 48, 81: 60, 82: 35, 99: 100})
    host.looks(1)
    assert host.ran == {HONEST: 0, LIAR: 0}
    host.looks(10)
    assert host.ran == pytest.approx({HONEST: 4.8e9, LIAR: 9.5e9})
    host.now += 60
    host.looks(1)
    assert host.ran[HONEST] == pytest.approx(4.8e9 + 2 * 0.48e9), "a late run of the audit covers two seconds"


def test_the_time_of_two_processes_does_not_exceed_the_whole_time():
    assert Host({81: 100, 82: 100}).looks(11).beyond[LIAR] == pytest.approx(0.5)


def test_the_audit_starts_again_after_a_missing_answer_of_nvml():
    host = Host({81: 100})
    assert host.looks(11).beyond
    host.percent = None
    assert host.looks(1) == Verdict()
    host.percent = {81: 100}
    assert host.looks(10) == Verdict()
    assert host.looks(1).outside


def test_the_audit_starts_again_after_a_pause_of_which_nvml_s_running_times_cover_a_second():
    host = Host({71: 50, 81: 50})
    assert host.looks(12).beyond == {HONEST: 0, LIAR: 0}
    host.now += 10
    host.unowned = 5  # no tenant had a turn in the pause
    assert host.looks(10) == Verdict()
    assert host.looks(1).beyond == {HONEST: 0, LIAR: 0}


def test_the_audit_has_no_result_for_tenants_that_are_not_gated():
    host = Host({81: 100})
    host.free = 1
    assert host.looks(11) == Verdict()


def test_a_tenant_without_counts_of_turns_owns_no_time():
    host = Host({81: 30})
    host.silent = True
    assert host.looks(11).beyond[LIAR] == pytest.approx(0.3)


def test_the_audit_starts_again_after_the_counts_of_turns_restart_at_zero():
    host = Host({81: 50})
    host.looks(11)
    host.now = 0.0
    assert host.looks(10) == Verdict()


def test_the_audit_runs_once_a_second():
    host = Host({})
    host.looks(1)
    assert (host.audit.due(host.now + 0.5), host.audit.due(host.now + 1.0)) == (False, True)
