"""A tenant reports at all times that a second of its work is in flight, and launches nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.commands import fgpu, metrics
from tests.support.host import BUILD, GIB
from tests.support.tenant import Program, Tenant
from tests.support.wait import eventually

FIRST_SECONDS, SECONDS = 3, 10
STEP = f"{BUILD}/bench/spin 100 burst"  # 50 kernels of 100 us
TURN_SECONDS = 2 * 0.020  # the longest turn of one of two equal tenants is two quanta
# Then the scheduler accepts the report for 4 ms, waits another 1 ms, and scans at most 1.75 ms later.
MORE_SECONDS = 0.004 + 0.001 + 0.00175


def program(tenant: Tenant, command: str) -> Program:
    """Start a program that has a context."""
    one = Program(tenant, "program", command)
    tenant._programs.append(one)
    assert one.receive() == "ready"
    tenant.assert_enforced()
    return one


@pytest.mark.timed
@pytest.mark.places("cgroups")
@pytest.mark.timeout(120)
def test_a_tenant_with_false_reports_delays_its_neighbour_little_and_is_named(tenant: Callable[[int], Tenant]) -> None:
    """The mean is compared, since the host's processors delay single turns."""
    honest, liar = tenant(GIB), tenant(GIB)
    for one in (honest, liar):
        fgpu("set", one.path, "--weight", "100")
    spin = program(honest, STEP)
    program(liar, f"{BUILD}/e2e/claimant")
    spin.send(f"{FIRST_SECONDS}")
    spin.receive(30)
    before = liar.memory()["compute"]
    spin.send(f"{SECONDS}")
    assert float(spin.receive(30).split()[0]) > 0
    after = liar.memory()["compute"]
    owned, turns = (after[key] - before[key] for key in ("owned_seconds", "waits"))
    assert owned > 0.2 * SECONDS, "the tenant with false reports had too few turns"
    assert after["overruns"] > before["overruns"], "no turn of the tenant with false reports was an overrun"
    assert owned / turns < TURN_SECONDS + MORE_SECONDS
    key = "fgpu_bypassing_processes", frozenset({("tenant", liar.name), ("how", "empty_turns")})
    eventually(lambda: metrics().get(key) == 1, 5, "the process in fgpu_bypassing_processes")
