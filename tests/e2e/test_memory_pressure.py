"""Agent and gatekeeper lack memory for seconds, or the kernel kills one of them for lack of memory. Limits hold."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.e2e.load_kit import load
from tests.e2e.memory_kit import MemoryGroup, questions
from tests.support.commands import ask
from tests.support.host import CONTEXT, GIB, MIB, REFUSED
from tests.support.place import Cgroups
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

ROOM = 40 * MIB
SECONDS = 3.0
pytestmark = pytest.mark.places("cgroups")


@pytest.fixture
def memory(service: Service, unharmed: None) -> Iterator[MemoryGroup]:
    """Run agent and gatekeeper in a cgroup of the memory controller. Afterwards both are outside of it."""
    group = MemoryGroup()
    try:
        start_in(service, group)
        yield group
    finally:
        group.close()
        if service.agent is None or service.agent.poll() is not None:
            service.start_agent()


def start_in(service: Service, group: MemoryGroup) -> None:
    service.kill_agent()
    service.kill_gatekeeper()
    with group.entered():
        service.start_agent()
    assert service.agent
    assert {service.agent.pid, *service.gatekeepers()} <= group.pids()


def assert_full(one: Tenant, limit: int) -> None:
    """Check that the limit is unchanged, and that a new program gets exactly the rest, including freed memory."""
    one.assert_enforced()
    assert one.memory()["limit_bytes"] == limit
    client = one.client()
    client.ok("context")
    room = limit - one.memory()["used_bytes"]
    client.ok(f"alloc {room}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact() == limit
    client.kill()


def test_limits_hold_and_programs_continue_while_agent_and_gatekeeper_have_no_memory(
    memory: MemoryGroup, place: Cgroups, service: Service
) -> None:
    limit = 3 * CONTEXT + ROOM
    one = place.tenant(limit)
    one.assert_enforced()
    _, stop = load(one)
    before = memory.waits()
    memory.throttle()
    with questions():
        time.sleep(SECONDS)
    assert memory.waits() > before, "agent and gatekeeper had enough memory: nothing was tested"
    memory.release()
    stop()
    eventually(partial(answers, service), 10, "an answer of the agent")
    assert_full(one, limit)


def answers(service: Service) -> bool:
    """Return whether the agent answers. While it was blocked, requests filled the queue of its socket."""
    with contextlib.suppress(BlockingIOError):
        return service.agent is not None and ask(verb="ping")["pid"] == service.agent.pid
    return False


def running(process: subprocess.Popen[bytes]) -> set[int]:
    """Return the pid of the process until it has exited."""
    return set() if process.poll() is not None else {process.pid}


@pytest.mark.parametrize("victim", ["agent", "gatekeeper"])
def test_limits_hold_after_the_kernel_kills_agent_or_gatekeeper_for_lack_of_memory(
    memory: MemoryGroup, place: Cgroups, service: Service, victim: str
) -> None:
    limit = 3 * CONTEXT + ROOM
    one = place.tenant(limit)
    one.assert_enforced()
    _, stop = load(one)
    assert service.agent
    agent, gatekeepers = service.agent, service.gatekeepers()
    for pid in gatekeepers if victim == "agent" else [agent.pid]:
        memory.leave(pid)
    with questions():
        if victim == "agent":
            eventually(lambda: memory.has_killed({agent.pid}, partial(running, agent)), 30, "the agent's end")
        else:
            eventually(lambda: memory.has_killed(gatekeepers, service.gatekeepers), 30, "the gatekeeper's end")
    memory.release()
    if victim == "agent":
        assert agent.returncode == -signal.SIGKILL
        service.start_agent()  # as systemd does
    eventually(service.gatekeepers, 5, "a gatekeeper")
    stop()
    assert_full(one, limit)
    other = place.tenant(GIB)
    assert_full(other, GIB)
