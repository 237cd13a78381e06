"""The first use of a device waits only until the agent has decided whether the limit counts there."""

from __future__ import annotations

import pytest

from tests.shim.orphans_kit import GIB, OOM, Call, call_while, in_time
from tests.shim.shim_kit import Agent

pytestmark = pytest.mark.timed

UNCOMMITTED, DEVICE, MOST_MS = 1 << 16, 3, 2000
MOST_LATE_MS = 1500  # a decision at 1.7 s is in time


def pending(agent: Agent, device: int = DEVICE, limit: int = GIB) -> None:
    agent.do("limit", limit=limit, flags=UNCOMMITTED << device)


def test_a_first_use_continues_when_it_is_granted(held: Agent) -> None:
    def trial() -> Call:
        pending(held)
        return call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", limit=GIB))

    result, ms, own_ms, _ = in_time(trial, MOST_LATE_MS)
    assert result == 0
    assert ms >= 190
    assert own_ms < 1000


def test_a_first_use_that_is_denied_is_refused_at_once(held: Agent) -> None:
    pending(held)
    result, ms, own_ms, _ = call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", limit=0))
    assert result == OOM
    assert ms >= 190
    assert own_ms < 1000


def test_a_first_use_without_a_decision_is_refused_after_2_s(held: Agent) -> None:
    pending(held)
    result, ms, own_ms, _ = call_while(held, "alloc(256 * MiB)")
    assert result == OOM
    assert ms >= MOST_MS - 10
    assert own_ms < MOST_MS + 500


@pytest.mark.parametrize("limit", [GIB, GIB // 8])
def test_a_call_does_not_wait_for_a_first_use_of_another_device(held: Agent, limit: int) -> None:
    pending(held, DEVICE + 1, limit)
    result, _, own_ms, _ = call_while(held, "alloc(256 * MiB)")
    assert result == (0 if limit == GIB else OOM)
    assert own_ms < 200


def pending_group(agent: Agent) -> None:
    """Add a group whose limit was set after the program's hello, so the program has no page of the group."""
    agent.do("knobs", outer=1)
    agent.do("limit", level=1, limit=GIB, flags=UNCOMMITTED << DEVICE)


@pytest.mark.parametrize("limit", [GIB, 0])
def test_a_first_use_under_a_later_group_waits_for_the_decision(held: Agent, limit: int) -> None:
    def trial() -> Call:
        pending_group(held)
        return call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", level=1, limit=limit))

    result, ms, own_ms, _ = in_time(trial, MOST_LATE_MS)
    assert result == (0 if limit else OOM)
    assert ms >= 190
    assert own_ms < 1000


def test_a_first_use_under_a_later_group_without_a_decision_is_refused_after_2_s(held: Agent) -> None:
    pending_group(held)
    result, ms, own_ms, _ = call_while(held, "alloc(256 * MiB)")
    assert result == OOM
    assert ms >= MOST_MS - 10
    assert own_ms < MOST_MS + 500
