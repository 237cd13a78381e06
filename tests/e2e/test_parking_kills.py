"""Agent, parker and tenant are killed while a tenant is parked and woken. No byte is lost, and no call hangs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.nursery_kit import Child, Children, children_of
from tests.e2e.parking_kit import HELD, Holder, Parker, becomes, parked_bytes, state
from tests.support import host
from tests.support.commands import fgpu
from tests.support.host import CONTEXT, FGPU, GIB, new_seed
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

BYTES = CONTEXT + HELD


@pytest.fixture
def one(parker: Parker, unharmed: None, tmp_path: Path) -> Iterator[Tenant]:
    place = Place(tmp_path)
    yield place.tenant(2 * GIB)
    place.close()


@pytest.fixture
def children(service: Service, one: Tenant) -> Iterator[Children]:
    """Return agents that replace the service's. Afterwards the service's agent runs again."""
    with children_of(service) as made:
        yield made
        made.end()
    service.stand()


def assert_killed(agent: Child) -> None:
    assert agent.wait(30) == -signal.SIGKILL, "the agent exited, but not at its point"


def assert_settled(tenant: Tenant) -> str:
    """Check that ledger and driver agree about a tenant that runs, or is parked. Return its state."""
    eventually(lambda: state(tenant) in ("running", "parked"), 20, "a settled tenant")
    is_parked = state(tenant) == "parked"
    held = tenant.assert_exact()
    assert (held, parked_bytes(tenant)) == ((0, BYTES) if is_parked else (BYTES, 0))
    return state(tenant)


def park_by_hand(program: Holder, tenant: Tenant) -> None:
    assert fgpu("park", tenant.name, check=False).returncode


def wake_by_hand(program: Holder, tenant: Tenant) -> None:
    assert fgpu("wake", tenant.name, check=False).returncode


POINTS: dict[str, tuple[bool, Callable[[Holder, Tenant], None], str]] = {  # parked before? act, state afterwards
    "park_unasked": (False, park_by_hand, "running"),
    "park_uncharged": (False, park_by_hand, "parked"),
    "wake_unasked": (True, wake_by_hand, "parked"),
    "wake_unended": (True, wake_by_hand, "running"),
}


@pytest.mark.parametrize("point", POINTS)
def test_an_agent_killed_at_each_point_leaves_a_tenant_that_the_next_one_knows(
    service: Service, one: Tenant, children: Children, point: str
) -> None:
    is_parked, act, wanted = POINTS[point]
    program = Holder(one, "h1")
    one.assert_exact()
    if is_parked:
        fgpu("park", one.name)
    service.kill_agent()
    agent = children.start("agent", point)
    if is_parked:
        becomes(one, "parked")
    act(program, one)
    assert_killed(agent)
    children.start()
    becomes(one, wanted)
    assert assert_settled(one) == wanted
    assert program.is_intact()
    assert assert_settled(one) == "running"


def test_a_call_that_began_without_an_agent_wakes_the_tenant(service: Service, one: Tenant, children: Children) -> None:
    program = Holder(one, "h1")
    fgpu("park", one.name)
    service.kill_agent()
    agent = children.start("agent", "wake_unasked")
    program.send("synchronise()")
    assert_killed(agent)
    children.start()
    assert program.receive(30) == "0"
    assert assert_settled(one) == "running"
    assert program.is_intact()


def start(*arguments: str) -> subprocess.Popen[bytes]:
    silent = subprocess.DEVNULL
    return subprocess.Popen([*FGPU, *arguments], stdout=silent, stderr=silent, env=host.ENVIRONMENT)


@pytest.mark.parametrize("victim", ["agent", "parker"])
def test_a_kill_at_any_moment_loses_no_byte(service: Service, parker: Parker, one: Tenant, victim: str, scale) -> None:
    program, chance = Holder(one, "h1"), random.Random(new_seed())
    one.assert_exact()
    for n in range(scale(3, 8, 200)):
        command = start("wake" if state(one) == "parked" else "park", one.name)
        time.sleep(chance.uniform(0.1, 0.6))
        if victim == "agent":
            service.kill_agent()
            service.start_agent()
        else:
            parker.kill()
            parker.start()
        command.wait(60)
        said = assert_settled(one)
        if said == "running" or n % 2:
            assert program.is_intact()
            assert assert_settled(one) == "running"


def test_a_tenant_killed_at_any_moment_leaves_nothing(one: Tenant, scale) -> None:
    chance = random.Random(new_seed())
    for n in range(scale(3, 8, 200)):
        program = Holder(one, f"h{n}")
        one.assert_exact()
        if n % 2:
            fgpu("park", one.name)
        command = start("wake" if n % 2 else "park", one.name)
        time.sleep(chance.uniform(0.1, 0.5))
        os.kill(program.pid, signal.SIGKILL)
        program.close()
        command.wait(60)
        becomes(one, "running", 20)
        eventually(lambda: not one.driver(), 10, "a driver without the tenant")
        eventually(lambda: one.memory()["used_bytes"] == parked_bytes(one) == 0, 10, "a tenant without a charge")
