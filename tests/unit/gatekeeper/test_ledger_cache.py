"""The levels that a process gets pages of when it registers."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.abi import ControlFlag
from fgpu_ebpf.gatekeeper import ledger_cache
from fgpu_ebpf.gatekeeper.ledger_cache import LedgerCache, Lineages, ManagedState
from fgpu_ebpf.scheduling.fair_queue import Share

PID, CGROUP, FORMER, GROUP = 23, 7, 5, 3


@pytest.mark.parametrize("is_parked", [False, True])
def test_a_parked_process_keeps_its_levels_wherever_it_is(is_parked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shim finds on the page of its own level that it has to hold calls back."""
    process = SimpleNamespace(is_parked=is_parked, levels=(FORMER, GROUP))
    ledger: Any = SimpleNamespace(process={PID: process}.get)
    lineages: Any = SimpleNamespace(of=lambda *_: (CGROUP, 1), owner=lambda *_: CGROUP)
    monkeypatch.setattr(ledger_cache, "managed_state", lambda *_: ManagedState(False, CGROUP))
    cache = LedgerCache(ledger, 1, (), lineages)
    unmanaged = ManagedState(False, CGROUP, owner=CGROUP)
    as_before = ManagedState(True, FORMER, (FORMER, GROUP), owner=CGROUP)
    assert cache.managed_state(PID, CGROUP) == (as_before if is_parked else unmanaged)
    assert cache.managed_state(PID + 1, CGROUP) == unmanaged


@pytest.mark.parametrize(
    ("limited", "concurrent", "shared", "flags"),
    [
        ({0}, {0}, {0}, ControlFlag.MANAGED | ControlFlag.MPS),
        ({0, 1}, {0, 1}, {1}, ControlFlag.MANAGED | ControlFlag.MPS),
        ({0, 1}, {0}, {0, 1}, ControlFlag.MANAGED),  # with MPS, a fault on device 1 would end programs of other tenants
        ({0}, {0}, set(), ControlFlag.MANAGED),  # nothing would hold the program
        (set(), {0}, set(), ControlFlag.MANAGED),
    ],
)
def test_programs_use_mps_if_all_their_devices_are_concurrent(limited, concurrent, shared, flags) -> None:
    share = {(CGROUP, device): Share() for device in shared}
    times = SimpleNamespace(concurrent=lambda: frozenset(concurrent), share=lambda *key: share.get(key))
    ledger: Any = SimpleNamespace(
        page_fd=lambda _: os.open("/dev/null", os.O_RDONLY),
        limit=lambda _, device: 1 if device in limited else None,
        times=times,
    )
    cache = LedgerCache(ledger, 1, [(0, b"a" * 16), (1, b"b" * 16)], Lineages(Path("/")))
    grant = cache.grant((CGROUP,))
    cache.close()
    assert grant
    assert grant.header.flags == flags
    assert {index for index, _ in grant.header.devices} == limited
