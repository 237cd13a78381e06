"""Tenants are parked by themselves when they have been idle for the time in their policy, and only then."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.parking_kit import HELD, Holder, Parker, becomes, state
from tests.e2e.policies_kit import Write
from tests.support.commands import events, fgpu
from tests.support.host import CONTEXT, GIB, REFUSED
from tests.support.place import Cgroups
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

AFTER = 10.0
BYTES = CONTEXT + HELD


@pytest.fixture
def host(parker: Parker, write: Write, tmp_path: Path) -> Iterator[Cgroups]:
    """Return a place in which the tenants have a policy that parks them."""
    place = Cgroups(tmp_path)
    park = f"park: {{after: {AFTER:.0f}s}}"
    write(f"memory: {{limit: {2 * GIB}B, {park}}}", selector=f'{{cgroup: ["{place.group.lstrip("/")}/*"]}}')
    yield place
    place.close()


def holder(tenant: Tenant) -> Holder:
    made = Holder(tenant, "h1")
    tenant._programs.append(made)
    tenant.assert_exact()
    tenant.assert_enforced()
    return made


def seen(tenant: Tenant) -> dict[str, Any]:
    return dict(tenant.view()["parking"])


def test_an_idle_notebook_gives_its_memory_to_another_and_returns_by_itself(host: Cgroups) -> None:
    notebook, other = host.named("notebook"), host.named("other")
    program = holder(notebook)
    fgpu("set", host.group, "--memory", f"{BYTES + CONTEXT}B")
    rival = other.client()
    assert rival.do(f"alloc {HELD}") == REFUSED
    eventually(lambda: seen(notebook)["idle_seconds"] > 5, 20, "an idle notebook")
    assert f"{notebook.name}: idle for " in fgpu("status").stdout
    becomes(notebook, "parked", 30)
    text = [e["text"] for e in events("parked") if e["tenant"] == notebook.name][-1]
    idle = re.search(r"idle for (\d+) s", text)
    assert idle, text
    assert int(idle[1]) >= AFTER, text
    rival.ok(f"alloc {HELD}")
    rival.kill()
    assert program.is_intact()
    becomes(notebook, "running")
    assert notebook.assert_exact() == BYTES
    eventually(lambda: seen(notebook)["idle_seconds"] is not None, 5, "the state of the notebook")
    assert seen(notebook)["idle_seconds"] < AFTER
    assert (seen(notebook)["parks"], seen(notebook)["wakes"]) == (1, 1)
    eventually(lambda: seen(notebook)["idle_seconds"] > 5, 20, "an idle notebook")
    assert "will be parked in " in fgpu("explain", notebook.path).stdout
    becomes(notebook, "parked", 30)
    assert program.is_intact()


def test_a_tenant_that_launches_now_and_then_or_is_in_a_long_kernel_is_not_parked(host: Cgroups) -> None:
    idle, rare, long, waits = (host.named(name) for name in ("idle", "rare", "long", "waits"))
    programs = {tenant.name: holder(tenant) for tenant in (idle, rare, long, waits)}
    for tenant, us in ((rare, 20), (long, 60_000_000), (waits, 60_000_000)):
        programs[tenant.name].do(f"kernel({us})")
        assert programs[tenant.name].do("launch()") == 0
    programs[waits.name].do("wait()")
    for _ in range(8):
        time.sleep(AFTER / 3)
        assert programs[rare.name].do("launch()") == 0
    assert state(idle) == "parked", seen(idle)
    for tenant in (rare, long, waits):
        assert (state(tenant), seen(tenant)["parks"]) == ("running", 0), tenant.name
    assert programs[idle.name].is_intact()


def test_a_tenant_that_cannot_be_parked_is_reported_once(host: Cgroups) -> None:
    one = host.named("one")
    program = holder(one)
    assert program.do(f"managed({HELD})") == 0

    def refusals() -> list[str]:
        return [event["text"] for event in events("not parked") if event["tenant"] == one.name]

    eventually(refusals, 30, "an event")
    assert "has managed memory" in refusals()[0]
    eventually(lambda: seen(one)["parked_in_seconds"] > AFTER, 5, "a pause before the next attempt")
    assert "cannot be parked now" in fgpu("explain", one.path).stdout
    assert len(refusals()) == 1


def test_a_policy_that_parks_has_no_effect_while_parking_is_off(
    host: Cgroups, service: Service, agent_yaml: Callable[[str, str], None]
) -> None:
    one = host.named("one")
    program = holder(one)
    agent_yaml("parking: on", "parking: off")
    assert "memory.park of the policy has no effect: parking is off" in fgpu("explain", one.path).stdout
    assert "idle tenants" in fgpu("doctor", check=False).stdout
    agent_yaml("parking: off", "parking: on")
    becomes(one, "parked", 30)
    assert program.is_intact()


@pytest.fixture
def agent_yaml(service: Service) -> Callable[[str, str], None]:
    """Return a function that replaces a text in agent.yaml, and restarts the agent."""

    def change(old: str, new: str) -> None:
        said = service.config.read_text()
        assert old in said
        service.config.write_text(said.replace(old, new))
        service.kill_agent()
        service.start_agent()

    return change
