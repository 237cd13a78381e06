"""Tests of the reports of adopted processes: each is reported once, and only for memory that two looks have seen."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.agent.reporters import AdoptionReports
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.ledger.unwitnessed_memory import Unwitnessed
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.preexisting import PreexistingProcesses

MIB = 1 << 20
CONTEXT, MODULES = 3 * MIB, 9 * MIB
ME = os.getpid()


class Host:
    """One process in one tenant, as NVML, the ledger and the enforcer show it."""

    def __init__(self, flags: int = 0, known: PreexistingProcesses | None = None) -> None:
        one = (5 * MIB, *[0] * 15)
        self.process = Process(9, (7,), flags, 0, True, one, one, *[(0,) * 16] * 3)
        self.truth = Truth(held={0: {ME: 5 * MIB}})
        self.usage = SimpleNamespace(limit=4 * MIB, used=5 * MIB)
        self.spared = 0
        self.history = EventLog()
        ledger = SimpleNamespace(process=lambda _: self.process, usage=lambda *_: [self.usage])
        enforcer = SimpleNamespace(
            preexisting=known or PreexistingProcesses(),
            get={7: SimpleNamespace(name="a", cgroup=7)}.get,
            update_spared=self._spare,
            use_charged=lambda _: None,
        )
        self.adoption = AdoptionReports(
            lambda: self.truth, ledger, enforcer, self.history, Unwitnessed({0: CONTEXT}, MODULES)
        )

    def _spare(self) -> None:
        self.spared += 1

    def told(self) -> list[tuple[str, str, int, str]]:
        self.adoption.look()
        return [(h["what"], h["reason"], h["bytes"], h["text"]) for h in self.history.since(0)["events"]]


BEYOND = "the tenant has 5MiB of 4MiB: nothing more is admitted"


def test_an_adopted_process_is_reported_once_while_nvml_lists_the_process() -> None:
    host = Host(known=PreexistingProcesses({ME: 1}))
    assert host.told() == [("adopted", "older than fgpu", 5 * MIB, BEYOND)]
    host.truth = Truth(held={0: {ME: 6 * MIB}})
    assert len(host.told()) == 1
    assert host.spared == 2
    host.truth = Truth()
    host.told()
    host.truth = Truth(held={0: {ME: 6 * MIB}})
    host.history = host.adoption._history = EventLog()
    assert len(host.told()) == 1, "a second process was not reported"


def test_memory_that_is_not_held_in_two_successive_looks_is_not_reported() -> None:
    host = Host()
    assert host.told() == []
    host.process = replace(host.process, bytes=(0,) * 16)
    host.truth = Truth(held={0: {ME: 0}})
    assert host.told() == []
    host.truth = Truth(held={0: {ME: 5 * MIB}})
    host.process = replace(host.process, bytes=(5 * MIB, *[0] * 15))
    assert host.told() == [], "the two comparisons are not successive"


def test_memory_within_the_limit_is_reported_without_an_excess() -> None:
    host = Host()
    host.usage = SimpleNamespace(limit=5 * MIB, used=5 * MIB)
    assert host.told() == [], "one comparison is not enough"
    host.truth = Truth(held={0: {ME: 5 * MIB}})
    assert host.told() == [("adopted", "unwitnessed", 5 * MIB, "")]


@pytest.mark.parametrize("flags", [abi.Seen.SHIM, abi.Seen.CALL, abi.Seen.CALL | abi.Seen.BYPASS])
def test_a_process_with_the_shim_or_a_witnessed_call_is_not_reported_as_adopted(flags: int) -> None:
    host = Host(flags)
    assert host.told() == []
    host.truth = Truth(held={0: {ME: 5 * MIB}})
    assert host.told() == []


def test_a_process_with_the_shim_is_reported_if_its_overhead_exceeds_context_and_modules() -> None:
    """The excess is memory of a second driver library in the process, under a name other than libcuda's."""
    host = Host(abi.Seen.SHIM | abi.Seen.CALL)
    for overhead, told in (
        (CONTEXT + MODULES, []),
        (CONTEXT + MODULES + 1, [("adopted", "unwitnessed", 5 * MIB, BEYOND)]),
    ):
        process = replace(host.process, overhead=(overhead, *[0] * 15), contexts=(1, *[0] * 15))
        for _ in range(2):
            host.process, host.truth = process, replace(host.truth, processes={ME: process})
            found = host.told()
        assert found == told


def test_a_process_with_the_shim_is_not_looked_up_in_the_ledger() -> None:
    host = Host(abi.Seen.SHIM)
    host.adoption._ledger.process = None
    host.truth = replace(host.truth, processes={ME: host.process})
    assert host.told() == []


def test_the_same_answer_of_nvml_is_processed_once() -> None:
    host = Host()
    host.told()
    host.adoption.look()
    assert host.spared == 1
