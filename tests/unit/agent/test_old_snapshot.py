"""Tests of a Snapshot that cannot be renewed: each output of the old Snapshot says so."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.agent import agent as agent_module
from fgpu_ebpf.agent.agent import Agent
from fgpu_ebpf.api import status_page
from fgpu_ebpf.snapshot import Fields, Snapshot
from fgpu_ebpf.tenancy.enforcement import no_limit


def test_a_snapshot_that_cannot_be_renewed_is_marked_until_the_state_can_be_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent: Any = Agent.__new__(Agent)
    agent.snapshot, agent._taken, agent._parts = Snapshot(1.0, gatekeeper_up=True), float("-inf"), object()
    agent.settings = SimpleNamespace(run_dir=Path("/nowhere"), trusted_drivers=())
    agent.engines, agent.failed_checks = SimpleNamespace(views=tuple), {}
    agent.writes_refused = agent.failures = 0

    def fail(*_: object) -> Snapshot:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(agent_module, "take_snapshot", fail)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        agent.fresh()
    assert "cannot be read: [Errno 12] Cannot allocate memory" in agent.snapshot.incomplete  # /readyz shows this text
    assert agent.snapshot.incomplete in no_limit(Fields(agent.snapshot))
    assert "limits may be out of date" in status_page.state(Fields(agent.snapshot))
    monkeypatch.setattr(agent_module, "take_snapshot", lambda *_: Snapshot(2.0))
    assert agent.fresh().incomplete == ""
