"""Tests of the agent's first steps: when the gatekeeper may start at the same time as the agent."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.agent import startup
from fgpu_ebpf.driver import host_driver, programs
from fgpu_ebpf.driver.start_checks import AgentError


@pytest.mark.parametrize(("begun", "started"), [(False, 1), (True, 0)])
def test_a_gatekeeper_starts_early_only_if_the_maps_of_this_version_are_pinned(
    monkeypatch: pytest.MonkeyPatch, begun: bool, started: int
) -> None:
    """Otherwise the gatekeeper could open maps that the agent then replaces."""

    def fail(*_: Any) -> None:
        raise AgentError("no device")

    loading = SimpleNamespace(begun=begun, end=lambda: None)
    monkeypatch.setattr(programs, "Loading", lambda *_: loading)
    monkeypatch.setattr(host_driver, "libcuda", lambda _: [Path("libcuda.so.1")])
    monkeypatch.setattr(host_driver, "prepare", fail)
    names = ("driver_root", "sources", "pins", "loader", "shim", "store")
    settings: Any = SimpleNamespace(**dict.fromkeys(names))
    calls: list[str] = []
    with pytest.raises(AgentError, match="no device"):
        startup.attach(settings, calls.append, lambda: calls.append("gatekeeper"))
    assert calls.count("gatekeeper") == started
