"""Labels, annotations and names of real pods, from containerd's own interface for kubelet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.labels_kit import HEAD, limit_of, write
from tests.support.commands import ask, fgpu
from tests.support.containers.containerd import Containerd
from tests.support.host import GIB, MIB, REFUSED
from tests.support.service import Service
from tests.support.wait import eventually

POLICIES = f"""---
{HEAD}metadata: {{name: notebooks}}
spec:
  selector: {{namespace: dev, matchLabels: {{tier: notebook}}}}
  memory: {{limit: 3GiB, max: 5GiB}}
---
{HEAD}metadata: {{name: pods}}
spec:
  selector: {{cgroup: "kubepods/burstable/**"}}
  memory: {{limit: 1GiB}}
"""


@pytest.fixture
def containerd(service: Service, unharmed: None, tmp_path: Path) -> Iterator[Containerd]:
    """Run containerd, with policies for its pods."""
    write(service, POLICIES)
    try:
        place = Containerd(tmp_path, service.containerd, {"fgpu.dev/memory": "2GiB"})
        yield place
        place.close()
    finally:
        write(service, "")


def at(path: str) -> tuple[str, str, int] | None:
    """Return name, policy and limit of the tenant at this path, or None."""
    found = next((t for t in ask(verb="snapshot")["tenants"] if t["path"] == path), None)
    return found and (found["tenant"], found["policy"], found["devices"][0]["limit_bytes"])


def test_a_pod_s_labels_apply_to_the_pod_before_its_first_container_and_to_each_container(
    containerd: Containerd,
) -> None:
    other = containerd.run("batch-0", {}, {})
    pod = containerd.run("jupyter-0", {"tier": "notebook"}, {"fgpu.dev/memory": "4GiB"})
    eventually(lambda: at(pod.path) == ("dev/jupyter-0", "notebooks", 4 * GIB), 5, f"the pod: {at(pod.path)}")
    eventually(lambda: at(other.path) == ("dev/batch-0", "pods", GIB), 5, f"the other: {at(other.path)}")
    one, second = pod.container("main"), pod.container("second")
    for tenant in (one, second):
        eventually(lambda at=tenant: limit_of(at) == ("notebooks", 4 * GIB), 5, f"the pod's: {limit_of(tenant)}")
        tenant.assert_enforced()
    client = one.client()
    assert client.ok("info")[1] == 4 * GIB
    client.ok(f"alloc {2 * GIB}")
    one.assert_exact()
    neighbour = second.client()
    neighbour.ok(f"fill {2 * MIB} 0")  # the rest of the pod's limit, not another 4 GiB
    assert neighbour.do(f"alloc {2 * MIB}") == REFUSED
    group = next(t for t in ask(verb="snapshot")["tenants"] if t["path"] == pod.path)
    assert (group["kind"], group["devices"][0]["used_bytes"]) == ("group", 4 * GIB)
    assert "notebooks" in fgpu("explain", "pod/dev/jupyter-0").stdout
    sandbox = at(f"{pod.path}/{pod.sandbox}")
    assert sandbox is not None
    assert sandbox[1] == "pods"  # the sandbox container, which only keeps the namespaces, has no label


def test_a_pod_of_the_kai_scheduler_gets_the_memory_that_its_annotation_requests(containerd: Containerd) -> None:
    """The image of its container requests 2 GiB for itself."""
    pod = containerd.run("train-0", {"tier": "notebook", "kai.scheduler/queue": "team"}, {"gpu-memory": "4096"})
    eventually(lambda: at(pod.path) == ("dev/train-0", "notebooks", 4 * GIB), 5, f"the pod: {at(pod.path)}")
    one = pod.container("main")
    eventually(lambda: limit_of(one) == ("notebooks", 2 * GIB), 5, f"the image's: {limit_of(one)}")
    one.assert_enforced()
    assert one.client().ok("info")[1] == 2 * GIB


def test_a_pod_that_hami_has_placed_gets_the_memory_that_was_booked(containerd: Containerd) -> None:
    """Each container may use what the largest needs, and both together the sum."""
    booked = "GPU-aaa,NVIDIA,1536,30:;;GPU-aaa,NVIDIA,1024,30:;"
    pod = containerd.run("hami-0", {"tier": "notebook"}, {"hami.io/vgpu-devices-allocated": booked})
    eventually(lambda: at(pod.path) == ("dev/hami-0", "notebooks", 2560 * MIB), 5, f"the pod: {at(pod.path)}")
    one, second = pod.container("main"), pod.container("second")
    for tenant in (one, second):
        eventually(lambda at=tenant: limit_of(at) == ("notebooks", 1536 * MIB), 5, f"booked: {limit_of(tenant)}")
        tenant.assert_enforced()
    client, neighbour = one.client(), second.client()
    assert client.ok("info")[1] == 1536 * MIB
    client.ok(f"fill {2 * MIB} 0")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact() == 1536 * MIB
    neighbour.ok(f"fill {2 * MIB} 0")
    assert neighbour.do(f"alloc {2 * MIB}") == REFUSED
    assert second.assert_exact() == 1024 * MIB


def test_a_pod_has_enough_for_the_shares_of_its_containers(containerd: Containerd) -> None:
    """The limit of the policy is lower than their sum, and its maximum is not."""
    pod = containerd.run("shares-0", {"tier": "notebook"}, {})
    eventually(lambda: at(pod.path) == ("dev/shares-0", "notebooks", 3 * GIB), 5, f"the pod: {at(pod.path)}")
    uuid = ask(verb="snapshot")["devices"][0]["uuid"]
    one, second = pod.container("main"), pod.container("second")
    for tenant in (one, second):
        ask(verb="share", pid=tenant.pids()[0], share=f"2gib:{uuid}")
        eventually(lambda at=tenant: limit_of(at) == ("notebooks", 2 * GIB), 5, f"the share: {limit_of(tenant)}")
        tenant.assert_enforced()
    eventually(lambda: at(pod.path) == ("dev/shares-0", "notebooks", 4 * GIB), 5, f"the pod: {at(pod.path)}")
    clients = one.client(), second.client()
    for tenant, client in zip((one, second), clients, strict=True):
        client.ok(f"fill {2 * MIB} 0")
        assert client.do(f"alloc {2 * MIB}") == REFUSED
        assert tenant.assert_exact() == 2 * GIB


def test_a_request_of_an_image_lowers_the_limit_of_its_container_but_not_of_the_pod(containerd: Containerd) -> None:
    pod = containerd.run("jupyter-1", {"tier": "notebook"}, {})
    one = pod.container("main")
    eventually(lambda: limit_of(one) == ("notebooks", 2 * GIB), 5, f"the image's limit: {limit_of(one)}")
    eventually(lambda: at(pod.path) == ("dev/jupyter-1", "notebooks", 3 * GIB), 1, f"the pod: {at(pod.path)}")
    one.assert_enforced()
    client = one.client()
    assert client.ok("info")[1] == 2 * GIB
    client.ok(f"fill {2 * MIB} 0")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact() == 2 * GIB
