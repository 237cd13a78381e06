"""Pods with ResourceClaims of NVIDIA's DRA driver, by the files that kubelet and that driver write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.labels_kit import HEAD, write
from tests.support.commands import ask, fgpu
from tests.support.containers.containerd import Containerd
from tests.support.host import GIB, MIB, REFUSED, SIM
from tests.support.kubernetes.nvidia_node import NvidiaNode
from tests.support.service import Service
from tests.support.wait import eventually

CLAIM, OTHER = "0b8f5b1e-9a64-4b44-8a2b-6c1f0f3d2a10", "1c9f5b1e-9a64-4b44-8a2b-6c1f0f3d2a11"
LATE = "2d0f5b1e-9a64-4b44-8a2b-6c1f0f3d2a12"
KNOWN = "claim dev/gpu-0b8f of gpu.nvidia.com: 4GiB of device 0"
UNKNOWN = "the size of dev/gpu-0b8f of gpu.nvidia.com is not known"


@pytest.fixture
def node(service: Service, unharmed: None, tmp_path: Path) -> Iterator[NvidiaNode]:
    """Restart the agent so that it reads the files of this node, by the path on the node."""
    said = service.config.read_text()
    service.config.write_text(f"{said}kubeletFolder: {tmp_path}/kubelet\n")
    found = NvidiaNode(tmp_path / "kubelet", [device["uuid"] for device in ask(verb="snapshot")["devices"]])
    service.kill_agent()
    service.start_agent()
    try:
        yield found
    finally:
        service.config.write_text(said)
        write(service, "")
        service.stand()
        service.kill_agent()
        service.start_agent()


@pytest.fixture
def containerd(node: NvidiaNode, service: Service, tmp_path: Path) -> Iterator[Containerd]:
    """Run containerd."""
    place = Containerd(tmp_path, service.containerd, {})
    yield place
    place.close()


def at(path: str) -> tuple[str, int] | None:
    """Return the policy and the limit of the tenant at this path; None: there is no tenant."""
    found: dict[str, Any] | None = next((t for t in ask(verb="snapshot")["tenants"] if t["path"] == path), None)
    return found and (found["policy"], found["devices"][0]["limit_bytes"])


def test_the_containers_of_a_pod_have_together_what_its_claim_has_consumed(
    containerd: Containerd, node: NvidiaNode, service: Service
) -> None:
    """The limit is in force at the start of the first container, and while files, agent and claims come and go."""
    pod = containerd.run("train-0", {}, {})
    node.use(CLAIM, pod.uid)
    node.prepare(CLAIM, "4Gi")
    one, second = pod.container("main"), pod.container("second")
    client = one.client()
    assert client.ok("info")[1] == 4 * GIB
    client.ok(f"alloc {2 * GIB}")
    neighbour = second.client()
    neighbour.ok(f"fill {2 * MIB} 0")  # the rest of the claim
    assert neighbour.do(f"alloc {2 * MIB}") == client.do(f"alloc {2 * MIB}") == REFUSED
    assert KNOWN in fgpu("explain", f"pod/dev/{pod.name}").stdout

    node.claims_file.unlink()
    service.kill_agent()
    service.start_agent()
    assert at(pod.path) == ("", 4 * GIB)
    assert UNKNOWN in fgpu("explain", f"pod/dev/{pod.name}").stdout
    assert client.do(f"alloc {2 * MIB}") == REFUSED

    node.prepare(CLAIM, "4Gi")
    eventually(lambda: KNOWN in fgpu("explain", pod.path).stdout, 5, "the claim")
    assert client.do(f"alloc {2 * MIB}") == REFUSED


def test_without_the_adapter_no_claim_is_read(containerd: Containerd, node: NvidiaNode, service: Service) -> None:
    service.config.write_text(f"{service.config.read_text()}adapters: [hami]\n")
    service.kill_agent()
    service.start_agent()
    pod = containerd.run("train-2", {}, {})
    node.use(CLAIM, pod.uid)
    node.prepare(CLAIM, "4Gi")
    client = pod.container("main").client()
    assert client.ok("info")[1] > 4 * GIB
    assert at(pod.path) is None


def test_a_pod_with_an_unknown_claim_gets_nothing_until_the_claim_is_known(
    containerd: Containerd, node: NvidiaNode, service: Service
) -> None:
    """The policy's limit is not a limit that the scheduler has counted."""
    policy = f"{HEAD}metadata: {{name: pods}}\nspec: {{selector: {{namespace: dev}}, memory: {{limit: 6GiB}}}}\n"
    write(service, policy)
    pod, free = containerd.run("train-1", {}, {}), containerd.run("free-0", {}, {})
    node.use(OTHER, pod.uid)
    one = pod.container("main")
    eventually(lambda: at(one.path) == ("pods", 0), 5, f"nothing: {at(one.path)}")
    eventually(lambda: at(free.path) == ("pods", 6 * GIB), 5, f"the policy: {at(free.path)}")
    client = one.client()
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    node.prepare(OTHER, "8Gi")
    eventually(lambda: at(one.path) == ("pods", 6 * GIB), 5, f"the policy's most: {at(one.path)}")
    client.ok(f"alloc {5 * GIB}")


def damaged(node: NvidiaNode) -> Iterator[Callable[[], object]]:
    """Yield functions that make a file or its claims unreadable. Each leaves the files that the previous one left."""
    yield lambda: node.prepare_in_another_form(CLAIM, OTHER)
    yield lambda: node.claims_file.write_text('{"v3": {"preparedClaims": {}}}')
    yield node.claims_file.unlink
    yield lambda: node.claims_file.symlink_to(node.claims_file.name)  # no process can open it
    yield lambda: node.pods_file.write_text("{")
    yield node.pods_file.unlink


def failed_check() -> str:
    """Return what `fgpu doctor` says of the claims; empty: nothing."""
    found = json.loads(fgpu("doctor", "--driver-root", SIM, "--json", check=False).stdout)
    return next((f"{one['found']}; {one['fix']}" for one in found if one["name"] == "nvidia claims"), "")


def test_running_pods_keep_what_they_have_at_each_start_with_unknown_claims(
    containerd: Containerd, node: NvidiaNode, service: Service
) -> None:
    """One pod has a whole device, one has a part of it, and one has started no container yet."""
    whole, part, late = (containerd.run(name, {}, {}) for name in ("whole", "part", "late"))
    for claim, pod in ((CLAIM, part), (OTHER, whole), (LATE, late)):
        node.use(claim, pod.uid)
    node.prepare(CLAIM, "4Gi")
    node.prepare(OTHER, None)
    free, limited = whole.container("main").client(), part.container("main").client()
    assert (free.ok("info")[1] > 8 * GIB, limited.ok("info")[1]) == (True, 4 * GIB)
    limited.ok(f"alloc {3 * GIB}")
    for number, damage in enumerate(damaged(node)):
        service.kill_agent()
        damage()
        service.start_agent()
        assert (at(whole.path), at(part.path)) == (None, ("", 4 * GIB)), number
        free.ok(f"alloc {GIB}")
        assert limited.do(f"alloc {GIB}") == REFUSED, number
        for pod in (whole, part):
            said = fgpu("explain", f"pod/dev/{pod.name}").stdout
            assert "not known: " in said, said
        assert str(node.folder) in failed_check(), number
    eventually(lambda: at(late.path) == ("", 0), 5, f"nothing: {at(late.path)}")
    for pod, answer in ((whole, "ok"), (part, REFUSED), (late, REFUSED)):
        assert pod.container("late").client().do(f"alloc {GIB}").split()[0] == answer.split()[0], pod.name

    node.prepare(LATE, "1Gi")
    node.prepare(CLAIM, "4Gi")
    node.prepare(OTHER, None)
    eventually(lambda: at(late.path) == ("", GIB), 5, f"the claim: {at(late.path)}")
    assert (at(whole.path), at(part.path), failed_check()) == (None, ("", 4 * GIB), "")
