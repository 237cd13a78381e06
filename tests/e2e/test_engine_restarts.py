"""An engine's daemon is killed and restarted while containers run: running and new containers have their limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.commands import metrics
from tests.support.containers.containerd import Containerd
from tests.support.containers.docker import Docker
from tests.support.host import GIB, MIB, REFUSED
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: engines}
spec:
  selector: {cgroup: ["docker/*", "kubepods/burstable/**"]}
  memory: {limit: 1GiB}
"""


@pytest.fixture
def policy(service: Service, unharmed: None) -> Iterator[None]:
    """Give every container 1 GiB."""
    file = service.policies / "engines.yaml"
    file.write_text(POLICY)
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 1, 5, "the policy")
    yield
    file.unlink()
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy")


@pytest.fixture
def docker(service: Service, policy: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """Run dockerd with live-restore, in a folder with a short name: a socket's path has 107 characters at most."""
    docker = Docker(tmp_path_factory.mktemp("d"), service.engine, "--live-restore")
    yield docker
    docker.close()


@pytest.fixture
def containerd(service: Service, policy: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """Run containerd, which always leaves containers running."""
    place = Containerd(tmp_path_factory.mktemp("d"), service.containerd, {})
    yield place
    place.close()


def fill(one: Tenant) -> Client:
    """Start a program that allocates all memory that the container may have."""
    one.assert_enforced()
    client = one.client()
    client.ok(f"fill {2 * MIB} 0")
    assert_full(one, client)
    return client


def assert_full(one: Tenant, client: Client) -> None:
    assert one.memory()["limit_bytes"] == GIB
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact() == GIB


def test_limits_hold_while_dockerd_is_killed_and_restarted(docker: Docker) -> None:
    one = docker.container({})
    client = fill(one)
    docker.kill_daemon()
    assert_full(one, client)
    docker.start_daemon()
    assert_full(one, client)
    fill(docker.container({}))
    assert_full(one, client)


def test_limits_hold_while_containerd_is_killed_and_restarted(containerd: Containerd) -> None:
    one = containerd.run("before-0", {}, {}).container("main")
    client = fill(one)
    containerd.kill_daemon()
    assert_full(one, client)
    containerd.start_daemon()
    assert_full(one, client)
    fill(containerd.run("after-0", {}, {}).container("main"))
    assert_full(one, client)
