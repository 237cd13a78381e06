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
from fgpu_ebpf.gatekeeper.sessions import PageHeader
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
    header = granted(limited, concurrent, {(CGROUP, device): Share() for device in shared}, CGROUP)
    assert header.flags == flags
    assert {index for index, _ in header.devices} == limited


@pytest.mark.parametrize("isolated", [CGROUP, GROUP])
def test_programs_do_not_use_mps_if_their_level_or_a_level_around_it_is_isolated(isolated: int) -> None:
    shares = {(level, 0): Share(isolated=level == isolated) for level in (CGROUP, GROUP)}
    assert granted({0}, {0}, shares, CGROUP, GROUP).flags == ControlFlag.MANAGED


def granted(limited: set[int], concurrent: set[int], shares: dict[tuple[int, int], Share], *levels: int) -> PageHeader:
    """Return the header of the control page of a program with these levels, on a host with the devices 0 and 1."""
    ledger: Any = SimpleNamespace(
        page_fd=lambda _: os.open("/dev/null", os.O_RDONLY),
        limit=lambda _, device: 1 if device in limited else None,
        times=SimpleNamespace(concurrent=lambda: frozenset(concurrent), share=lambda *key: shares.get(key)),
    )
    cache = LedgerCache(ledger, 1, [(0, b"a" * 16), (1, b"b" * 16)], Lineages(Path("/")))
    grant = cache.grant(levels)
    cache.close()
    assert grant
    return grant.header
