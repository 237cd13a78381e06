"""Tests of what `fgpu-info` prints for the levels and the share of a process."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.gatekeeper import info_text
from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.scheduling.fair_queue import Share

MIB, NOW_NS = 1 << 20, 50_000_000_000
GPU = uuid.UUID("12345678-1234-1234-1234-123456789012")
HEAD = f"gpu 0 GPU-{GPU}"


def page(cgroup: int, limit: int, used: int = 0, refused: int = 0, flags: int = 0) -> abi.UsagePage:
    made = abi.UsagePage(cgroup=cgroup, flags=flags)
    made.devices[0] = abi.Usage(limit, used, used, refused)
    return made


def said(monkeypatch: pytest.MonkeyPatch, *pages: abi.UsagePage, share: Any = None, turn: Any = None) -> list[str]:
    by_cgroup = {one.cgroup: one for one in pages}
    monkeypatch.setattr(info_text, "_page", lambda _, cgroup: by_cgroup.get(cgroup))
    times = SimpleNamespace(share=lambda level, _: share if level == 1 else None, turn=lambda *_: turn)
    ledger: Any = SimpleNamespace(times=times)
    return info_text.text(ledger, (1, 2, 3), [(0, GPU.bytes)], NOW_NS).splitlines()


def test_fgpu_info_prints_limit_use_and_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, page(1, 8192 * MIB, 3200 * MIB, refused=2)) == [
        f"{HEAD}: limit 8192 MiB, used 3200 MiB, free 4992 MiB",
        "  refused so far: 2",
    ]
    assert said(monkeypatch, page(1, MIB, 3 * MIB)) == [f"{HEAD}: limit 1 MiB, used 3 MiB, free 0 MiB"]


def test_fgpu_info_reports_a_group_that_leaves_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, page(1, 8192 * MIB, 1024 * MIB), page(3, 4096 * MIB, 4000 * MIB)) == [
        f"{HEAD}: limit 4096 MiB, used 1024 MiB, free 96 MiB",
        "  the limit of a group around this container leaves less than the container's own limit",
    ]


def test_fgpu_info_reports_a_missing_limit_and_a_limit_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch)[0].startswith("no limit: ")
    assert said(monkeypatch, page(1, abi.NO_LIMIT, MIB)) == [f"{HEAD}: no limit, used 1 MiB"]
    assert said(monkeypatch, page(1, 0)) == [f"{HEAD}: limit 0, no allocation of this container fits"]


def test_fgpu_info_reports_observed_limits_and_uncommitted_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, page(1, MIB, flags=abi.LimitFlag.OBSERVE))[-1].startswith("limits of this container")
    assert said(monkeypatch, page(1, MIB, flags=abi.uncommitted(0)))[1].startswith("  not used so far")


def test_fgpu_info_prints_the_share_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    share = Share(500_000, 100, 1, 0)
    alone = said(monkeypatch, page(1, MIB), share=share, turn=TurnCounts(free=1))
    assert alone[1:] == [
        "  time: up to 50%, weight 100, normal priority",
        "  no other container shares the device's time now",
    ]
    beside = said(monkeypatch, page(1, MIB), share=share, turn=TurnCounts(free=2))
    assert beside[2:] == ["  turns: none; runs at the same time as other containers on this device"]
    turn = TurnCounts(
        had_millionths=240_000, entitled_millionths=250_000, wait_ns=12_300_000_000, since_ns=NOW_NS - 10**9
    )
    assert said(monkeypatch, page(1, MIB), share=share, turn=turn)[2:] == [
        "  turns: 24% of the last half second, entitled to 25%; waited 12.3 s in total",
        "  waiting for its turn for 1.0 s",
    ]
