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
# The tenant delays its neighbour by more than an honest tenant does: the scheduler accepts the report for 4 ms, then
# waits another 1 ms, and scans at most 1.75 ms later.
MORE_US = 4_000 + 1_000 + 1_750


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
    honest, other, liar = tenant(GIB), tenant(GIB), tenant(GIB)
    for one in (honest, other, liar):
        fgpu("set", one.path, "--weight", "100")
    spin, busy = program(honest, STEP), program(other, STEP)
    busy.send(f"{SECONDS}")
    spin.send(f"{SECONDS / 2}")
    _, _, beside_honest_us, *_ = (float(word) for word in spin.receive(30).split())
    busy.receive(30)
    program(liar, f"{BUILD}/e2e/claimant")
    spin.send(f"{FIRST_SECONDS}")
    spin.receive(30)
    before = liar.memory()["compute"]
    spin.send(f"{SECONDS}")
    done, _, p99_us, *_ = (float(word) for word in spin.receive(30).split())
    after = liar.memory()["compute"]
    assert after["owned_seconds"] - before["owned_seconds"] > 0.2 * SECONDS, "it has turns"
    assert after["overruns"] > 0, "others have waited for it in vain"
    assert done > 0
    assert p99_us < beside_honest_us + MORE_US
    key = "fgpu_bypassing_processes", frozenset({("tenant", liar.name), ("how", "empty_turns")})
    eventually(lambda: metrics().get(key) == 1, 5, "its name")
