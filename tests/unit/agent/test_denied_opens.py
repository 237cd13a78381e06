"""`onBypass: deny`: exempted processes, and the check of `fgpu doctor`."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.agent.denied_opens import NAME, DeniedOpens
from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.check import Check


@dataclass
class Host:
    """Stands in for a host with tenants, a ledger and a result of NVML."""

    fault: str = ""
    tenants: list[Any] = field(default_factory=list)
    truth: Truth = field(default_factory=Truth)
    checks: dict[str, Check] = field(default_factory=dict)
    majors: list[int] = field(default_factory=list)
    exempted: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        opens = SimpleNamespace(
            set_majors=lambda found: self.majors.extend(found), exempt=lambda *which: self.exempted.append(which)
        )
        ledger: Any = SimpleNamespace(opens=opens)
        self.opens = DeniedOpens(ledger, lambda: self.truth, self.tenants, lambda: self.fault, self.checks)


@pytest.fixture
def host() -> Host:
    return Host()


def test_a_kernel_without_the_program_is_a_failed_check_of_hosts_that_deny(host: Host) -> None:
    host.fault = "this kernel refuses it"
    host.tenants.append(SimpleNamespace(name="alice", deny=False))
    host.opens.look()
    assert (host.checks, host.majors) == ({}, [])
    host.tenants.append(SimpleNamespace(name="bob", deny=True, observe=False))
    host.opens.look()
    check = host.checks.get(NAME)
    assert check is not None
    assert (check.ok, check.found) == (False, "onBypass: deny is not in force for bob: this kernel refuses it")
    assert 195 in host.majors
    host.fault = ""
    host.opens.look()
    assert host.checks == {}


def process(flags: int) -> Any:
    return SimpleNamespace(flags=flags, generation=7)


def test_each_process_without_the_shim_that_nvml_shows_is_exempted_once(host: Host) -> None:
    flags = {1: 0, 2: abi.Seen.SHIM, 3: abi.SEEN_DEVICE, 4: abi.Seen.CALL}
    host.truth = Truth(
        held={0: {1: 2**20, 2: 2**20, 3: 2**20, 9: 2**20}}, processes={pid: process(its) for pid, its in flags.items()}
    )
    host.opens.look()
    assert host.exempted == [(1, 7)]
