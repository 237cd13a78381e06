"""Contexts besides the limit (`memory.contexts`): programs see the limit without them, and can use all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.commands import ask, fgpu, metrics
from tests.support.host import CONTEXT, GIB, MIB, REFUSED
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

pytestmark = pytest.mark.places("cgroups")
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: besides}}
spec:
  selector: {{cgroup: ["fgpu-e2e-*/*"]}}
  memory: {{limit: 1GiB, contexts: {0}}}
"""


@pytest.fixture
def policy(service: Service, unharmed: None) -> Iterator[Callable[[int], None]]:
    """Return a function that writes a policy with a number of contexts."""

    def put(contexts: int) -> None:
        aside = service.policies / ".besides"
        aside.write_text(POLICY.format(contexts))
        aside.rename(service.policies / "besides.yaml")
        fgpu("reload")

    yield put
    (service.policies / "besides.yaml").unlink()
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy in force")


@pytest.fixture
def one(policy: Callable[[int], None], tenant: Callable[[int], Tenant]) -> Tenant:
    """Return a tenant with 1 GiB and one context."""
    policy(1)
    one = tenant(GIB)
    fgpu("unset", one.path)
    one.assert_enforced()
    return one


def level(one: Tenant) -> dict[str, Any]:
    """Return the tenant's figures on the device, as `fgpu explain` has them."""
    return ask(verb="explain", target=one.path)["levels"][0]["devices"][0]


def test_a_program_sees_and_gets_the_limit_besides_its_context(one: Tenant) -> None:
    client = one.client()
    client.ok("context")
    assert client.ok("info") == [GIB, GIB]
    with one.growing():
        client.ok(f"alloc {900 * MIB}")
    assert client.ok("info") == [124 * MIB, GIB]
    assert client.do(f"alloc {126 * MIB}") == REFUSED
    client.ok(f"alloc {124 * MIB}")
    assert client.ok("info") == [0, GIB]
    assert one.assert_exact() == CONTEXT + GIB
    query = "nvidia-smi --query-gpu=memory.total,memory.used,memory.free --format=csv,noheader,nounits"
    assert one.run(query).split(", ") == ["1024", "1024", "0\n"]
    assert one.client().do("context") == REFUSED


def test_the_limit_in_force_is_shown_and_survives_a_restart(service: Service, one: Tenant) -> None:
    client = one.client()
    client.ok("context")
    for _ in range(2):
        assert (level(one)["limit_bytes"], level(one)["outside_bytes"]) == (GIB + CONTEXT, CONTEXT)
        assert "518MiB of the limit for contexts" in fgpu("explain", one.path).stdout
        assert client.ok("info") == [GIB, GIB]
        service.kill_agent()
        assert client.ok("info") == [GIB, GIB]
        service.start_agent()


def test_a_change_of_the_number_holds_at_once(policy: Callable[[int], None], one: Tenant) -> None:
    client = one.client()
    client.ok("context")
    with one.growing():
        client.ok(f"alloc {GIB}")
    policy(0)
    eventually(lambda: client.ok("info") == [0, GIB], 2, "the limit without a context")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    policy(2)
    other = one.client()
    other.ok("context")
    assert other.ok("info") == [0, GIB]
    assert one.assert_exact() == 2 * CONTEXT + GIB


def test_a_limit_that_is_set_by_hand_has_the_contexts_of_the_policy(policy: Callable[[int], None], one: Tenant) -> None:
    fgpu("set", one.path, "--memory", "600MiB")
    client = one.client()
    client.ok("context")
    assert client.ok("info") == [600 * MIB, 600 * MIB]
    assert level(one)["limit_bytes"] == 600 * MIB + CONTEXT
    policy(0)
    eventually(lambda: level(one)["limit_bytes"] == 600 * MIB, 2, "the limit without a context")


def test_a_broken_policy_file_and_a_restart_leave_the_contexts_in_force(service: Service, one: Tenant) -> None:
    client = one.client()
    client.ok("context")
    file = service.policies / "besides.yaml"
    said = file.read_text()
    file.write_text("no policy")
    service.kill_agent()
    service.start_agent()
    assert client.ok("info") == [GIB, GIB]
    assert (level(one)["limit_bytes"], level(one)["outside_bytes"]) == (GIB + CONTEXT, CONTEXT)
    file.write_text(said)


def test_a_group_without_contexts_of_its_own_counts_those_of_its_tenants(place: Place, one: Tenant) -> None:
    fgpu("set", place.group, "--memory", "900MiB")
    try:
        client = one.client()
        client.ok("context")
        assert client.ok("info") == [900 * MIB - CONTEXT, 900 * MIB]
        client.ok(f"alloc {900 * MIB - CONTEXT}")
        assert client.do(f"alloc {2 * MIB}") == REFUSED
        assert client.ok("info") == [0, 900 * MIB]
        client.kill()
    finally:
        fgpu("unset", place.group)
