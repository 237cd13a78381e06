"""The first use of a device waits for the agent, which decides whether the limit counts there: so long, no longer."""

from __future__ import annotations

import pytest
from shim_kit import Agent
from test_shim_orphans import GIB, OOM, call_while

UNCOMMITTED, DEVICE, MOST_MS = 1 << 16, 3, 2000


def pending(agent: Agent, device: int = DEVICE, limit: int = GIB) -> None:
    agent.do("limit", limit=limit, flags=UNCOMMITTED << device)


def test_a_first_use_goes_on_when_it_is_granted(held: Agent) -> None:
    pending(held)
    result, ms = call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", limit=GIB))
    assert result == 0
    assert 190 <= ms < 1000


def test_a_first_use_that_is_denied_is_refused_at_once(held: Agent) -> None:
    pending(held)
    result, ms = call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", limit=0))
    assert result == OOM
    assert 190 <= ms < 1000


def test_without_a_decision_it_is_refused_in_time(held: Agent) -> None:
    pending(held)
    result, ms = call_while(held, "alloc(256 * MiB)")
    assert result == OOM
    assert MOST_MS - 10 <= ms < MOST_MS + 500


@pytest.mark.parametrize("limit", [GIB, GIB // 8])
def test_of_another_device_nothing_is_waited_for(held: Agent, limit: int) -> None:
    pending(held, DEVICE + 1, limit)
    result, ms = call_while(held, "alloc(256 * MiB)")
    assert result == (0 if limit == GIB else OOM)
    assert ms < 200
