"""The stop of an agent stops each of its parts, even if another part raises an exception."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from fgpu_ebpf.agent.agent import Agent

PARTS = ("policies", "engines", "parking", "reconciler", "usage", "gatekeeper")


class Part:
    """A part that records its stop, and raises an exception in it if it `fails`."""

    def __init__(self, name: str, stopped: list[str], fails: bool) -> None:
        self.name, self.stopped, self.fails = name, stopped, fails

    def stop(self) -> None:
        """Record the stop. Raises OSError if the part `fails`."""
        self.stopped.append(self.name)
        if self.fails:
            raise OSError(5, f"{self.name} cannot be stopped")


def agent_of(stopped: list[str], failing: tuple[str, ...], is_wired: bool = True) -> Agent:
    """Return an agent with all of its parts, or only with those that it has before its start."""
    agent = Agent.__new__(Agent)
    agent.failures = 0
    part = {name: Part(name, stopped, name in failing) for name in PARTS}
    chores = SimpleNamespace(usage=part["usage"], parking=part["parking"])
    wired = SimpleNamespace(policies=part["policies"], reconciler=part["reconciler"], chores=chores)
    wired = wired if is_wired else None
    for name, value in (("_parts", wired), ("engines", part["engines"]), ("gatekeeper", part["gatekeeper"])):
        setattr(agent, name, value)
    return agent


@pytest.mark.parametrize("failing", [(), *((name,) for name in PARTS), PARTS], ids="+".join)
def test_a_part_that_raises_does_not_prevent_the_stop_of_others(
    failing: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    stopped: list[str] = []
    agent = agent_of(stopped, failing)
    with caplog.at_level(logging.ERROR, "fgpu.agent"):
        agent.stop()
    assert stopped == [*PARTS]
    assert agent.failures == len(failing)
    assert {str(record.exc_info[1]) for record in caplog.records if record.exc_info} == {
        f"[Errno 5] {name} cannot be stopped" for name in failing
    }


def test_an_agent_stopped_before_its_start_stops_its_engines_and_gatekeeper() -> None:
    stopped: list[str] = []
    agent_of(stopped, (), is_wired=False).stop()
    assert stopped == ["engines", "gatekeeper"]
