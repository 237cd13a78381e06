"""Tenants with limits that exceed a small device, and idle tenants that are parked for others (`overcommit: park`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.parking_kit import HELD, Holder
from tests.e2e.policies_kit import Write
from tests.support.commands import events
from tests.support.host import CONTEXT, MEMORY, MIB
from tests.support.place import Cgroups
from tests.support.tenant import Tenant

DEVICE = "2GiB"
LIMIT = 1200 * MIB  # more than half of the device
BYTES = CONTEXT + 512 * MIB
STAY = 10.0  # seconds for which a tenant without work stays
PATIENCE = 3  # seconds for which requests of carol wait
inside = pytest.mark.skipif(MEMORY != DEVICE, reason="is run by test_the_file_s_tests_pass_on_a_small_device")


def tenants(write: Write, work: Path) -> Iterator[Cgroups]:
    """Return a place in which the policy allows all tenants but `fixed` to be parked."""
    place = Cgroups(work)
    for name, cgroups, park in (
        ("fixed", ["fixed"], ""),
        ("idle", ["alice", "bob"], ", park: {after: 1h}"),
        ("hasty", ["carol"], f", park: {{after: 1h, deadline: {PATIENCE}s}}"),
    ):
        paths = [f"{place.group.lstrip('/')}/{cgroup}" for cgroup in cgroups]
        write(f"memory: {{limit: {LIMIT}B{park}}}", name, f"{{cgroup: {paths}}}", f"{name}.yaml")
    yield place
    place.close()


def entered(turns: Cgroups, name: str) -> tuple[Tenant, Holder]:
    """Return a tenant with a program that holds a context and HELD."""
    tenant = turns.named(name)
    program = Holder(tenant, "h1")
    tenant._programs.append(program)
    return tenant, program


def started(turns: Cgroups, name: str) -> tuple[Tenant, Holder]:
    """Return a tenant with a program that holds BYTES, HELD of them with a pattern."""
    tenant, program = entered(turns, name)
    assert program.do(f"alloc({BYTES - CONTEXT - HELD})")[0] == 0
    assert tenant.assert_exact() == BYTES
    tenant.assert_enforced()
    return tenant, program


def texts(what: str, tenant: Tenant) -> list[str]:
    return [event["text"] for event in events(what) if event["tenant"] == tenant.name]


def parks(tenant: Tenant) -> int:
    return int((tenant.view()["parking"] or {"parks": 0})["parks"])
