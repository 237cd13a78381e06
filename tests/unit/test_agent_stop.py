"""The end of an agent: each part of it is stopped, whatever another one raises."""

from __future__ import annotations

import logging

import pytest

from fgpu_ebpf.agent.agent import Agent

PARTS = ("_policies", "engines", "reconciler", "keeper")


class Part:
    """Remembers that it was stopped, and raises then if it `fails`."""

    def __init__(self, name: str, stopped: list[str], fails: bool) -> None:
        self.name, self.stopped, self.fails = name, stopped, fails

    def stop(self) -> None:
        """Stop a part of an agent."""
        self.stopped.append(self.name)
        if self.fails:
            raise OSError(5, f"{self.name} cannot be stopped")


def agent_of(stopped: list[str], failing: tuple[str, ...], missing: str = "") -> Agent:
    """An agent that has come as far as these parts."""
    agent = Agent.__new__(Agent)
    agent.failures = 0
    for name in PARTS:
        setattr(agent, name, None if name == missing else Part(name, stopped, name in failing))
    return agent


@pytest.mark.parametrize("failing", [(), *((name,) for name in PARTS), PARTS], ids="+".join)
def test_a_part_that_raises_keeps_no_other_from_being_stopped(
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


@pytest.mark.parametrize("missing", PARTS)
def test_a_part_that_a_start_did_not_reach_is_left_out(missing: str) -> None:
    stopped: list[str] = []
    agent_of(stopped, (), missing).stop()
    assert stopped == [name for name in PARTS if name != missing]
