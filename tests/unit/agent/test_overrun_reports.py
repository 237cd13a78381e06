"""Tests of OverrunReports: only new overruns are reported, with their number and not one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fgpu_ebpf.agent import reporters
from fgpu_ebpf.agent.reporters import AGAIN_SECONDS, LOOK_SECONDS, OverrunReports
from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.tenancy.event_log import EventLog


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return counts by level that a test sets, a clock that it moves, and the reports."""
    made = SimpleNamespace(counts={1: 5}, now=100.0, history=EventLog())
    monkeypatch.setattr(reporters.time, "monotonic", lambda: made.now)

    def turns():
        return {(level, 0): TurnCounts(overruns=n) for level, n in made.counts.items()}

    one = OverrunReports(turns, lambda level: f"tenant-{level}", made.history)

    def told(seconds: float) -> list[tuple[str, str]]:
        made.now += seconds
        before = made.history.since(0)["last"]
        one.look()
        return [(h["tenant"], h["text"]) for h in made.history.since(before)["events"]]

    made.told, made.one = told, one
    return made


def test_earlier_overruns_are_not_reported(host) -> None:
    assert host.told(LOOK_SECONDS) == []
    host.counts[1] = 6
    assert host.told(LOOK_SECONDS) == [("tenant-1", "a turn ended with work in flight")]


def test_many_overruns_of_a_tenant_give_one_line_in_ten_seconds_and_all_are_counted(host) -> None:
    host.counts |= {1: 8, 2: 1}
    assert host.told(LOOK_SECONDS) == [
        ("tenant-1", "3 turns ended with work in flight"),
        ("tenant-2", "a turn ended with work in flight"),
    ]
    for number in range(9, 14):
        host.counts[1] = number
        assert host.told(LOOK_SECONDS) == []
    assert host.told(AGAIN_SECONDS) == [("tenant-1", "5 turns ended with work in flight")]
    assert host.told(AGAIN_SECONDS) == []


def test_the_overrun_count_of_a_removed_level_starts_again_at_zero(host) -> None:
    host.counts[1] = 2
    assert host.told(LOOK_SECONDS) == [("tenant-1", "2 turns ended with work in flight")]
    del host.counts[1]
    assert host.told(AGAIN_SECONDS) == []
    assert host.one._reported == {}
    host.counts[1] = 1
    assert host.told(LOOK_SECONDS) == [("tenant-1", "a turn ended with work in flight")]


def test_overruns_are_checked_once_a_second(host) -> None:
    host.told(LOOK_SECONDS)
    host.counts[1] = 9
    assert host.told(LOOK_SECONDS / 3) == []
    assert host.told(LOOK_SECONDS) != []
