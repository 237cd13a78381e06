"""Limits change under a running program, which then reads and gets the new total. Nothing is restarted.

`./dev bench live` measures the delay. The bound here is twenty times that command's bar of 100 ms, because the test
machine has two busy processors.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, fgpu, metrics
from tests.support.host import CONTEXT, GIB, MIB, REFUSED
from tests.support.service import Service
from tests.support.tenant import Client
from tests.support.wait import eventually

SECONDS = 2.0
LOW, HIGH = GIB, GIB + 64 * MIB
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: live}}
spec:
  selector: {{cgroup: ["fgpu-e2e-*/*"]}}
  memory: {{limit: {0}MiB}}
"""


def put(service: Service, limit: int) -> None:
    """Write the policy, and replace the old file atomically."""
    aside = service.policies / ".live"
    aside.write_text(POLICY.format(limit // MIB))
    aside.rename(service.policies / "live.yaml")


@pytest.fixture
def policy(service: Service, unharmed: None) -> Iterator[Callable[[int], None]]:
    """Return a function that writes a limit to a policy file."""
    yield lambda limit: put(service, limit)
    (service.policies / "live.yaml").unlink()
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy in force")


def watcher(one) -> Client:
    """Start a program that leaves 8 MiB of LOW free, so that 16 MiB do not fit in LOW and fit in HIGH."""
    one.assert_enforced()
    client = one.client()
    client.ok("context")
    with one.growing():
        client.ok(f"alloc {LOW - CONTEXT - 8 * MIB}")
    return client


def assert_follows(client: Client, limit: int) -> None:
    """Check that within SECONDS the program reads the limit, and that the limit applies to its next allocation."""
    eventually(lambda: client.ok("info")[1] == limit, SECONDS, f"a total of {limit // MIB} MiB")
    said = client.do(f"alloc {16 * MIB}").split()
    if limit == LOW:
        assert said[0] == REFUSED
    else:
        assert said[0] == "ok"
        client.ok(f"free {said[1]}")


@pytest.mark.places("cgroups")
def test_set_and_unset_change_the_limit_of_a_running_program(policy, tenant) -> None:
    policy(HIGH)
    one = tenant(LOW)
    client = watcher(one)
    for number in range(5):
        fgpu("set", one.path, "--memory", f"{HIGH // MIB + number}MiB")
        assert_follows(client, HIGH + number * MIB)
        fgpu("set", one.path, "--memory", f"{LOW}B")
        assert_follows(client, LOW)
    fgpu("unset", one.path)
    assert_follows(client, HIGH)
    assert client.pid in one.pids()
    assert one.assert_exact() == LOW - 8 * MIB


@pytest.mark.places("cgroups")
def test_a_policy_file_changes_the_limit_of_a_running_program(policy, tenant) -> None:
    policy(LOW)
    one = tenant(LOW)
    fgpu("unset", one.path)
    client = watcher(one)
    for limit in (HIGH, LOW, HIGH):
        policy(limit)
        assert_follows(client, limit)
    assert one.view()["source"] == "policy"
    assert client.pid in one.pids()


@pytest.mark.places("cgroups")
@pytest.mark.parametrize("how", ["reload", "SIGHUP"])
def test_a_reload_changes_the_limit_of_a_running_program(service: Service, policy, tenant, how: str) -> None:
    """A reload reads the request of the cgroup itself (its extended attribute), whose change causes no file event."""
    policy(LOW)
    one = tenant(LOW)
    fgpu("unset", one.path)
    client = watcher(one)
    text = POLICY.format(LOW // MIB).replace("MiB}", f"MiB, max: {HIGH // MIB}MiB}}")
    before = metrics()["fgpu_config_last_reload_success_timestamp_seconds", frozenset()]
    (service.policies / "live.yaml").write_text(text)
    key = "fgpu_config_last_reload_success_timestamp_seconds", frozenset()
    eventually(lambda: metrics()[key] > before, 5, "the policy in force")
    for limit in (HIGH, LOW):
        os.setxattr(Path(one.cgroup), "user.fgpu.memory", f"{limit}B".encode())
        if how == "reload":
            ask(verb="reload")
        else:
            assert service.agent
            service.agent.send_signal(signal.SIGHUP)
        assert_follows(client, limit)
