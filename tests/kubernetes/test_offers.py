"""The chart's device plugin as a pod with exactly its listed rights, a stand-in for kubelet, and the agent's pod.

The tests follow one another on one node.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.kubernetes import node_kit
from tests.support.commands import ask
from tests.support.host import CONTEXT, GIB, MIB, REFUSED, SIM
from tests.support.kubernetes import kubelet as kubelet_kit
from tests.support.kubernetes import pods as pods_kit
from tests.support.wait import eventually

KUBELET = Path("/var/lib/kubelet/device-plugins")
CDI = Path("/var/run/cdi")
ETC_CDI = Path("/etc/cdi")  # this machine's own
SHARE, SIZE = "2gib-25pct", 2 * GIB


@pytest.fixture(scope="module")
def manifest() -> Path:
    """Return the chart with a device plugin and no other change."""
    return Path(__file__).with_name("rendered") / "offers.yaml"


@pytest.fixture(scope="module")
def kubelet(node: node_kit.Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kubelet_kit.Kubelet]:
    """Run kubelet's side of the interface, in its own folder."""
    KUBELET.mkdir(parents=True)
    found = kubelet_kit.Kubelet(KUBELET, tmp_path_factory.mktemp("made"))
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def plugin(node: node_kit.Node, kubelet: kubelet_kit.Kubelet) -> Iterator[node_kit.Pod]:
    """Run the device plugin's pod, beside those of gatekeeper and agent."""
    was_there = ETC_CDI.exists()
    for name in ("gatekeeper", "agent"):
        node.apply(f"fgpu-{name}")
    yield node.apply("fgpu-device-plugin")
    if not was_there:
        ETC_CDI.rmdir()  # it is empty: only kubelet may write there


@pytest.fixture
def pods(plugin: node_kit.Pod, tmp_path: Path) -> Iterator[pods_kit.Pods]:
    """Return containers of runc with the edits of a runtime that reads CDI."""
    found = pods_kit.Pods(tmp_path, "runc", [CDI])
    yield found
    found.close()


def test_the_plugin_has_no_rights_but_those_listed(plugin: node_kit.Pod) -> None:
    one = plugin.containers["device-plugin"]
    facts, mounts = one.facts(), {mount["mountPath"] for mount in one.spec["volumeMounts"]}
    assert "add" not in one.spec["securityContext"]["capabilities"]
    assert {value for name, value in facts.items() if name.startswith("Cap")} == {"0" * 16}
    assert (facts["NoNewPrivs"], facts["Seccomp"], facts["Uid"].split()[0]) == ("1", "2", "0")
    assert facts["NSpid"].split()[1:] == ["1"], "the plugin's pid namespace is the node's"
    assert not plugin.spec.get("hostPID")
    assert mounts == {str(KUBELET), "/run/fgpu", str(CDI), str(ETC_CDI)}
    for folder in ("/usr", "/", "/run/fgpu", CDI, ETC_CDI):
        code, said = one.run("touch", f"{folder}/mine")
        assert (code, "Read-only file system" in said) == (1, True), said


def test_the_plugin_registers_and_lists_its_ids(kubelet: kubelet_kit.Kubelet, plugin: node_kit.Pod) -> None:
    (uuid,) = [device["uuid"] for device in ask(verb="snapshot")["devices"]]
    for name, count in ((SHARE, 2), ("1gib", 3)):
        resource = kubelet.resource(name)
        assert resource.ids == [f"{uuid}::{name}::{number}" for number in range(count)]
        eventually(lambda one=resource: one.healthy == one.ids, 20, plugin.containers["device-plugin"].log)
    assert {request.version for request in kubelet.registrations} == {"v1beta1"}


def test_a_pod_has_its_allocated_share_and_no_more(kubelet: kubelet_kit.Kubelet, pods: pods_kit.Pods) -> None:
    """The pod has its share to the byte, by the driver's own figures."""
    resource = kubelet.resource(SHARE)
    answer = resource.allocate(resource.ids[0])
    uuid = resource.ids[0].partition("::")[0]
    assert [device.name for device in answer.cdi_devices] == [f"fgpu.dev/share={SHARE}:{uuid}"]
    assert answer.envs == {"NVIDIA_VISIBLE_DEVICES": uuid}
    tenant = pods.pod(answer)
    client = tenant.client()
    assert client.ok("info") == [SIZE - CONTEXT, SIZE]
    client.ok(f"alloc {SIZE - CONTEXT}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert tenant.assert_exact() == SIZE
    (share,) = [d["compute"]["limit_ratio"] for d in tenant.view()["devices"]]
    assert share == 0.25


def test_the_plugin_registers_again_after_a_restart_of_kubelet(
    kubelet: kubelet_kit.Kubelet, plugin: node_kit.Pod
) -> None:
    before = plugin.containers["device-plugin"].pid
    kubelet.stop()
    kubelet.registrations.clear()
    kubelet.start()
    assert kubelet.resource(SHARE).healthy
    assert plugin.containers["device-plugin"].pid == before


def test_a_killed_plugin_pod_registers_again_when_restarted(kubelet: kubelet_kit.Kubelet, plugin: node_kit.Pod) -> None:
    before = kubelet.resource(SHARE)
    plugin.containers["device-plugin"].kill()
    plugin.containers["device-plugin"].ended()
    plugin.start("device-plugin")
    after = eventually(lambda: (one := kubelet.resource(SHARE)) is not before and one, 60, "another registration")
    assert after.ids == before.ids


@pytest.mark.flaky(reruns=0)  # the device stays broken after this test
def test_a_failed_device_is_reported_from_the_agent_s_pod(kubelet: kubelet_kit.Kubelet, plugin: node_kit.Pod) -> None:
    """The agent's pod has no additional rights for this."""
    resource = kubelet.resource(SHARE)
    eventually(lambda: resource.healthy == resource.ids, 20, "healthy")
    subprocess.run([SIM / "fgpu-simd", "--fault", "xid=79"], check=True, timeout=10)
    eventually(lambda: not resource.healthy, 20, plugin.containers["device-plugin"].log)
    with pytest.raises(grpc.RpcError) as caught:
        resource.allocate(resource.ids[0])
    assert "the device has reported XID 79" in caught.value.details()


def test_each_container_s_peak_memory_is_below_its_limit(
    node: node_kit.Node, kubelet: kubelet_kit.Kubelet, plugin: node_kit.Pod
) -> None:
    """A full run starts the pod without files in the page cache, because cached files are charged to their readers."""
    if os.environ.get("FGPU_TEST_SCALE") == "full":
        Path("/proc/sys/vm/drop_caches").write_text("1")
        plugin.containers["device-plugin"].kill()
        plugin.containers["device-plugin"].ended()
        before = kubelet.resource(SHARE)
        plugin.start("device-plugin")
        eventually(lambda: kubelet.resource(SHARE) is not before, 60, "another registration")
    for pod in node.pods_of_manifests:
        for name, one in pod.containers.items():
            limit = int(one.spec["resources"]["limits"]["memory"].removesuffix("Mi")) << 20
            peak = one.memory_peak_bytes()
            print(
                f"{name} {peak / MIB:.1f} MiB of {limit // MIB}, {one.facts()['VmHWM'] if one.status[3] == 1 else ''}"
            )
            assert peak < limit, name


@pytest.mark.flaky(reruns=0)  # the pod has ended after this test
def test_the_end_of_the_plugin_leaves_nothing_in_kubelet_s_folder(
    kubelet: kubelet_kit.Kubelet, plugin: node_kit.Pod
) -> None:
    plugin.end()
    assert [path.name for path in KUBELET.iterdir()] == ["kubelet.sock"]
