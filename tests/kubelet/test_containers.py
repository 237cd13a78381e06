"""The path from kubelet's request to a container that has its share of its device, and nothing of another device."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.support.commands import ask, fgpu
from tests.support.containers import engines
from tests.support.host import CONTEXT, GIB, MIB, REFUSED
from tests.support.kubernetes import kubelet as kit
from tests.support.kubernetes.pods import Pods
from tests.support.service import Service
from tests.support.sim_driver import driver_books
from tests.support.tenant import Tenant
from tests.support.wait import eventually

NVIDIA = {
    "cdiVersion": "0.5.0",
    "kind": "nvidia.com/gpu",
    "devices": [{"name": name, "containerEdits": {"env": [f"GPU={name}"]}} for name in ("0", "1", "all")],
    "containerEdits": {"env": ["DRIVER=yes"]},
}
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: first}
spec:
  selector: {cgroup: "fgpu-e2e/*"}
  devices: ["0"]
  memory: {limit: 1GiB, max: 2GiB}
"""


@pytest.fixture(params=["runc", "crun"])
def pods(request: pytest.FixtureRequest, service: Service, tmp_path: Path) -> Iterator[Pods]:
    """Return containers of each runtime."""
    found = Pods(tmp_path, request.param, [service.cdi, tmp_path / "cdi"])
    yield found
    found.close()
    eventually(lambda: not driver_books(), 20, "an empty driver")


def assert_only(tenant: Tenant, limits: dict[int, int]) -> None:
    """Check that the share holds to the byte on these devices, and that other devices refuse all memory."""
    for device in (0, 1):
        client = tenant.client()
        if device not in limits:
            assert client.do(f"device {device}") == REFUSED
            assert client.do(f"alloc {2 * MIB}") == REFUSED
            continue
        client.ok(f"device {device}")
        assert client.ok("info") == [limits[device] - CONTEXT, limits[device]]
        client.ok(f"alloc {limits[device] - CONTEXT}")
        assert client.do(f"alloc {2 * MIB}") == REFUSED
    eventually(lambda: tenant.driver_by_device() == limits, 10, f"{limits} by the driver's own books")
    assert shown(tenant) == limits


def shown(tenant: Tenant) -> dict[int, int]:
    """Return the tenant's limits by device, without limits of 0."""
    return {seen["gpu"]: seen["limit_bytes"] for seen in tenant.view()["devices"] if seen["limit_bytes"]}


def test_a_pod_has_its_share_of_its_device(
    kubelet: kit.Kubelet, plugin: kit.Plugin, pods: Pods, uuids: list[str], service: Service
) -> None:
    two = kubelet.resource("2gib-25pct")
    answer = two.allocate(two.ids[3])
    assert two.ids[3].startswith(uuids[1])
    assert [device.name for device in answer.cdi_devices] == [f"fgpu.dev/share=2gib-25pct:{uuids[1]}"]
    assert answer.envs == {"NVIDIA_VISIBLE_DEVICES": uuids[1]}
    assert not answer.annotations
    tenant = pods.pod(answer)
    assert_only(tenant, {1: 2 * GIB})
    said = json.loads(fgpu("explain", tenant.path, "--json").stdout)
    assert [level["compute"][0]["limit_ratio"] for level in said["levels"]] == [0.25]
    service.kill_agent()
    service.start_agent()
    eventually(lambda: shown(tenant) == {1: 2 * GIB}, 10, "the same share by the next agent")
    assert tenant.client().do("device 0") == REFUSED


def test_a_pod_has_shares_of_two_devices(
    kubelet: kit.Kubelet, plugin: kit.Plugin, pods: Pods, uuids: list[str]
) -> None:
    one = kubelet.resource("1gib")
    answer = one.allocate(*one.preferred(2, one.ids))
    assert [device.name for device in answer.cdi_devices] == [f"fgpu.dev/share=1gib:{uuid}" for uuid in uuids]
    assert answer.envs["NVIDIA_VISIBLE_DEVICES"] == ",".join(uuids)
    assert_only(pods.pod(answer), {0: GIB, 1: GIB})


def test_used_slots_are_counted_as_taken_until_their_pods_end(
    kubelet: kit.Kubelet, plugin: kit.Plugin, pods: Pods, uuids: list[str]
) -> None:
    """Two pods use a device. After both have ended, none of its slots is taken, and a slot can be allocated again."""
    two, one = kubelet.resource("2gib-25pct"), kubelet.resource("1gib")
    ids, name = two.ids[:2], f"2gib-25pct:{uuids[0]}"
    started = ask(verb="offers")["started"].get(name, 0)
    tenants = [pods.pod(two.allocate(id_)) for id_ in ids]
    assert [entry["taken"] for entry in ask(verb="offers")["devices"][0]["profiles"]] == [2, 0]
    free = ask(verb="offers")["devices"][0]["free_bytes"]
    assert free == ask(verb="offers")["devices"][1]["free_bytes"] - 4 * GIB, "memory of the other device is not counted"
    assert (two.healthy, one.healthy) == (two.ids, one.ids)
    for tenant in tenants:
        tenant.end()
    pods.tenants.clear()
    eventually(lambda: ask(verb="offers")["devices"][0]["profiles"][0]["taken"] == 0, 20, "the end")
    again = pods.pod(two.allocate(ids[1]))
    assert_only(again, {0: 2 * GIB})
    assert ask(verb="offers")["started"][name] == started + 3


def test_shares_of_devices_do_not_sum_over_devices(
    pods: Pods, uuids: list[str], service: Service, tmp_path: Path
) -> None:
    """All but 1 GiB of each device is requested. The sum exceeds one device, but each device counts only its own."""
    (tmp_path / "cdi").mkdir()
    for uuid in uuids:
        spec = (service.cdi / "fgpu.dev-share.json").read_text().replace(f"1gib:{uuid}", f"5gib:{uuid}")
        own = json.loads(spec)
        own["devices"] = [device for device in own["devices"] if device["name"] == f"5gib:{uuid}"]
        (tmp_path / f"cdi/{uuid}.json").write_text(json.dumps(own))
        for _ in range(3):
            pods.pod(names=[f"fgpu.dev/share=5gib:{uuid}"])
    with pytest.raises(AssertionError) as caught:
        pods.pod(names=[f"fgpu.dev/share=5gib:{uuids[1]}"])
    assert "do not fit on device 1" in str(caught.value) or pods._runtime == "crun"


@pytest.mark.parametrize("other", ["4gib:1", "1gib:0", "2gib", "1gib:0 and a policy"])
def test_only_equal_shares_of_different_devices_that_a_policy_gives_can_be_combined(
    pods: Pods, uuids: list[str], service: Service, other: str
) -> None:
    """A container may have two shares if both have one name, each is of one device, and a policy gives both devices."""
    share, device = "1gib", uuids[1]
    name = re.sub(r":(\d).*", lambda found: f":{uuids[int(found[1])]}", other)
    said = f"the container has fgpu.dev/share={share} already: request a single share"
    if other == "1gib:0":
        pods.pod(names=[f"fgpu.dev/share={share}:{device}", f"fgpu.dev/share={name}"])
        return
    by_policy = "policy" in other
    with engines.policy(service, "pods.yaml", POLICY) if by_policy else contextlib.nullcontext():
        if by_policy:
            assert_only(pods.pod(names=[f"fgpu.dev/share={name}"]), {0: GIB})
            said = f"policy first does not permit device {device} for this container"
        with pytest.raises(AssertionError) as caught:
            pods.pod(names=[f"fgpu.dev/share={share}:{device}", f"fgpu.dev/share={name}"])
        assert said in str(caught.value) or pods._runtime == "crun", caught.value


# -- ways to pass a device ---------------------------------------------------------------------------------------------


def test_a_device_known_to_cdi_is_given_by_cdi(
    kubelet: kit.Kubelet, plugin: kit.Plugin, pods: Pods, uuids: list[str], tmp_path: Path
) -> None:
    (tmp_path / "cdi").mkdir()
    named = {"name": uuids[1], "containerEdits": {"env": ["GPU=by-uuid"]}}
    (tmp_path / "cdi/nvidia.json").write_text(json.dumps({**NVIDIA, "devices": [*NVIDIA["devices"], named]}))
    (tmp_path / "cdi/broken.yaml").write_text("nvidia.com/gpu: [")
    one = kubelet.resource("1gib")
    answer = one.allocate(next(id_ for id_ in one.ids if id_.startswith(uuids[1])))
    names = [device.name for device in answer.cdi_devices]
    assert names == [f"nvidia.com/gpu={uuids[1]}", f"fgpu.dev/share=1gib:{uuids[1]}"]
    assert answer.envs == {"NVIDIA_VISIBLE_DEVICES": "void"}
    tenant = pods.pod(answer)
    assert tenant.run("printenv GPU DRIVER FGPU_SHARE").split() == ["by-uuid", "yes", "1gib"]
    assert_only(tenant, {1: GIB})
    assert one.allocate(one.ids[0]).envs["NVIDIA_VISIBLE_DEVICES"] != "void", "device 0 is not visible"


def test_devices_are_passed_by_annotation_without_cdi_in_kubelet(
    kubelet: kit.Kubelet, start: Callable[..., kit.Plugin], pods: Pods, uuids: list[str]
) -> None:
    """The runtime reads the names of the devices in the annotations."""
    start("--device-list-strategy", "cdi-annotations")
    one = kubelet.resource("1gib")
    answers = [one.allocate(one.ids[0]), one.allocate(one.ids[1])]
    assert not answers[0].cdi_devices
    (key, value), (other, _) = [next(iter(answer.annotations.items())) for answer in answers]
    assert re.fullmatch(r"cdi\.k8s\.io/[A-Za-z0-9][A-Za-z0-9_.-]{0,61}[A-Za-z0-9]", key)
    assert other != key, "two resources of one container have the same annotation"
    assert value == f"fgpu.dev/share=1gib:{uuids[0]}"
    assert_only(pods.pod(answers[0], value.split(",")), {0: GIB})


def test_a_container_gets_mounts_and_variables_without_cdi(
    kubelet: kit.Kubelet, start: Callable[..., kit.Plugin], service: Service
) -> None:
    """The mounts are those of the shim, and the variables those that a policy uses."""
    start("--device-list-strategy", "mounts", "--gpu-strategy", "none")
    two = kubelet.resource("2gib-25pct")
    answer = two.allocate(two.ids[0])
    assert answer.annotations == {"fgpu.dev/memory": "2GiB", "fgpu.dev/compute": "25%"}
    assert not answer.cdi_devices
    assert not answer.envs
    mounts = {mount.container_path: (mount.host_path, mount.read_only) for mount in answer.mounts}
    spec = json.loads((service.cdi / "fgpu.dev-shim.json").read_text())
    edits = spec["devices"][0]["containerEdits"]["mounts"]
    assert mounts == {mount["containerPath"]: (mount["hostPath"], True) for mount in edits}


def test_a_device_unknown_to_cdi_is_refused_if_cdi_is_required(
    kubelet: kit.Kubelet, start: Callable[..., kit.Plugin]
) -> None:
    start("--gpu-strategy", "cdi")
    one = kubelet.resource("1gib")
    with pytest.raises(grpc.RpcError) as caught:
        one.allocate(one.ids[0])
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "nvidia-ctk cdi generate" in caught.value.details()
