"""Under `onBypass: kill` a restart of agent and gatekeeper kills no program of a tenant that is within its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.bypass_kit import BYPASS, RAW, Bypass
from tests.support.commands import events, metrics
from tests.support.host import GIB, MIB, REFUSED
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: kill}}
spec:
  selector: {{cgroup: ["{group}/*"]}}
  memory: {{limit: 2GiB}}
  onBypass: kill
"""
RESTARTS = 3


@pytest.fixture
def tenant_of_policy(service: Service, place: Place) -> Iterator[Callable[[], Tenant]]:
    """Yield a function that creates tenants to which the policy gives 2 GiB."""
    file = service.policies / "kill.yaml"
    file.write_text(POLICY.format(group=place.group.lstrip("/")))
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 1, 5, "the policy")
    yield lambda: place.tenant(None)
    file.unlink()
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy")


@pytest.mark.places("cgroups")
def test_a_restart_kills_no_program_within_its_limit(service: Service, tenant_of_policy: Callable[[], Tenant]) -> None:
    """One program requests admission, one bypasses the shim, and the calls of one are reported by no probe.

    Together they hold the whole limit.
    """
    one = tenant_of_policy()
    one.assert_enforced()
    asks = one.client()
    outside, unseen = Bypass(one, "outside", f"env -u LD_PRELOAD {BYPASS} plain"), Bypass(one, "unseen", RAW)
    for client in (outside, unseen):
        client.ok(f"alloc {100 * MIB}")
    one.assert_exact(5)
    asks.ok("context")
    asks.ok(f"fill {2 * MIB} 0", 120)
    assert one.assert_exact(5) == one.memory()["limit_bytes"] == 2 * GIB
    for _ in range(RESTARTS):
        service.kill_agent()
        service.kill_gatekeeper()
        service.start_agent()
        assert asks.do(f"alloc {2 * MIB}") == REFUSED
        assert one.assert_exact(5) == 2 * GIB
        asks.ok("drop 1")
        asks.ok(f"alloc {2 * MIB}")
    eventually(lambda: one.memory()["used_bytes"] == 2 * GIB, 5, "the charge of the whole limit")
    assert {asks.pid, outside.pid, unseen.pid} <= set(one.pids())
    assert not [e for e in events("killed") if e["tenant"] == one.name]
