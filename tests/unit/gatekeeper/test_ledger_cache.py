"""The levels that a process gets pages of when it registers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.gatekeeper import ledger_cache
from fgpu_ebpf.gatekeeper.ledger_cache import LedgerCache, ManagedState

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
