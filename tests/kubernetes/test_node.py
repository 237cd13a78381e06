"""Tests of deploy/kubernetes on a real containerd and runc, with exactly its rights: no cluster, no kubectl.

The tests follow one another on one node, from the first pod to the node's state before the installation.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

import pytest

from tests.kubernetes import node_kit
from tests.support.commands import ask
from tests.support.host import BUILD, CONTEXT, GIB, MIB, REFUSED, ROOT
from tests.support.tenant import Tenant
from tests.support.wait import Timeout, eventually

# linux/capability.h
CAPABILITIES = {
    "DAC_READ_SEARCH": 2,
    "KILL": 5,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "SYS_NICE": 23,
    "PERFMON": 38,
    "BPF": 39,
}
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: dev}}
spec:
  selector: {{namespace: [dev]}}
  memory: {{limit: {limit}GiB, max: 4GiB}}
"""
PORT = 9423
FEW = 2
TENANTS = 100 if os.environ.get("FGPU_TEST_SCALE") == "full" else FEW
DETACH = ROOT / "tests/kubernetes/rendered/detach-parking.yaml"


@pytest.fixture(scope="module")
def pods(node: node_kit.Node) -> dict[str, node_kit.Pod]:
    """Return the pods of both DaemonSets, which are ready by their own probes."""
    return {name: node.apply(f"fgpu-{name}") for name in ("gatekeeper", "agent")}


def limits() -> dict[str, int]:
    """Return each tenant's limit of memory on its first device, in bytes."""
    return {t["tenant"]: t["devices"][0]["limit_bytes"] for t in ask(verb="snapshot")["tenants"]}


@pytest.fixture(scope="module")
def tenant(node: node_kit.Node, pods: dict[str, node_kit.Pod]) -> Tenant:
    """Return a container of a pod in the namespace `dev`, with the five mounts."""
    return node.run("train-0", {}, {}).container("main")


def test_each_container_has_only_the_rights_of_the_manifest(pods: dict[str, node_kit.Pod]) -> None:
    for name in pods:
        one = pods[name].containers[name]
        facts, context = one.facts(), one.spec["securityContext"]
        named = {CAPABILITIES[capability] for capability in context["capabilities"]["add"]}
        given_up = {CAPABILITIES["SYS_NICE"]} if name == "gatekeeper" else set()  # it has raised its priority before
        assert int(facts["CapBnd"], 16) == sum(1 << right for right in named), name
        assert int(facts["CapEff"], 16) == sum(1 << right for right in named - given_up), name
        assert (facts["NoNewPrivs"], facts["Seccomp"], facts["Uid"].split()[0]) == ("1", "2", "0")
        code, said = one.run("touch", "/usr/mine")
        assert (code, "Read-only file system" in said) == (1, True), said


def test_the_agent_s_pod_reads_the_node_s_files_of_kubelet(pods: dict[str, node_kit.Pod], tmp_path: Path) -> None:
    """It has no mount of kubelet's folder. The default of `kubeletFolder` begins with the same root."""
    place = tmp_path / "dra_manager_state"
    place.write_text("mine")
    place.chmod(0o600)
    assert pods["agent"].containers["agent"].run("cat", f"/proc/2/root{place}") == (0, "mine")


def test_a_pod_gets_the_limit_of_the_config_map_and_of_its_next_version(node: node_kit.Node, tenant: Tenant) -> None:
    for limit in (1, 2):
        node.publish("fgpu-policies", {"10-dev.yaml": POLICY.format(limit=limit)})
        eventually(lambda limit=limit: limits().get(tenant.name) == limit * GIB, 30, f"{limits()}")
    client = tenant.client()
    assert client.ok("info")[1] == 2 * GIB
    client.ok(f"alloc {GIB}")
    assert client.do(f"alloc {GIB}") == REFUSED
    assert tenant.assert_exact() == GIB + CONTEXT
    node.publish("fgpu-policies", {"10-dev.yaml": POLICY.format(limit=3)})
    eventually(lambda: limits().get(tenant.name) == 3 * GIB, 30, f"{limits()}")
    client.ok(f"alloc {GIB}")  # a running program reads it too
    client.close()


def test_a_pod_s_annotation_applies_as_far_as_the_policy_allows(node: node_kit.Node, tenant: Tenant) -> None:
    asking = node.run("train-1", {}, {"fgpu.dev/memory": "4GiB"}).container("main")
    eventually(lambda: limits().get(asking.name) == 4 * GIB, 30, f"{limits()}")


def test_a_tenant_is_found_by_its_process(pods: dict[str, node_kit.Pod], tenant: Tenant) -> None:
    """The process's cgroup is outside the agent's own, and so is its path."""
    client = tenant.client()
    code, said = pods["agent"].containers["agent"].run("fgpu", "explain", f"pid/{client.pid}")
    assert (code, tenant.path in said) == (0, True), said
    client.close()


def test_a_program_in_a_sandbox_without_sockets_has_the_limit(tenant: Tenant) -> None:
    """The gatekeeper copies a descriptor of the program, with the runtime's seccomp profile."""
    client = tenant.client(before=f"{BUILD}/e2e/sandboxed {errno.EPERM}")
    assert client.ok("info")[1] == 3 * GIB
    assert client.complaints() == ""
    client.close()


def test_metrics_name_the_tenant(node: node_kit.Node, tenant: Tenant) -> None:
    status, page = node.get(PORT, "/metrics")
    assert status == 200
    assert re.search(rf'fgpu_tenant_enforcement\{{[^}}]*tenant="{tenant.name}"[^}}]*\}} 1', page), page


def test_the_gatekeeper_answers_and_limits_hold_without_an_agent(pods: dict[str, node_kit.Pod], tenant: Tenant) -> None:
    gatekeeper = pods["gatekeeper"].containers["gatekeeper"]
    before = gatekeeper.pid
    eventually(lambda: tenant.memory()["used_bytes"] == 0, 10, "the release of earlier programs' memory by the agent")
    pods["agent"].containers["agent"].kill()
    pods["agent"].containers["agent"].ended()
    assert gatekeeper.probe("livenessProbe")
    client = tenant.client()
    client.ok(f"alloc {2 * GIB}")
    assert client.do(f"alloc {GIB}") == REFUSED
    client.close()
    agent = pods["agent"].start("agent")
    eventually(lambda: agent.probe("startupProbe"), 60, agent.log)
    assert gatekeeper.pid == before
    assert agent.probe("livenessProbe")
    eventually(lambda: limits().get(tenant.name) == 3 * GIB, 30, f"{limits()}")


def test_the_next_gatekeeper_waits_beside_the_last_and_takes_over(
    node: node_kit.Node, pods: dict[str, node_kit.Pod], tenant: Tenant
) -> None:
    """A DaemonSet with maxSurge: 1 is rolled out."""
    last = pods["gatekeeper"]
    pods["gatekeeper"] = following = node.apply("fgpu-gatekeeper")
    lock = Path("/run/fgpu/gatekeeper.lock")
    assert int(lock.read_text()) == last.containers["gatekeeper"].pid
    last.end()
    eventually(lambda: int(lock.read_text() or 0) == following.containers["gatekeeper"].pid, 10, lock.read_text())
    client = tenant.client()
    assert client.ok("info")[1] == 3 * GIB
    client.close()
    assert "starting a new gatekeeper" not in pods["agent"].containers["agent"].log


def test_a_gatekeeper_that_hangs_fails_its_probe(pods: dict[str, node_kit.Pod]) -> None:
    one = pods["gatekeeper"].containers["gatekeeper"]
    os.kill(one.pid, signal.SIGSTOP)
    try:
        assert not one.probe("livenessProbe")
    finally:
        os.kill(one.pid, signal.SIGCONT)
    assert one.probe("livenessProbe")


def test_each_container_s_peak_memory_is_below_its_limit(node: node_kit.Node, pods: dict[str, node_kit.Pod]) -> None:
    """All tenants hold memory, and the pods start without any of their files in the page cache."""
    if TENANTS > FEW:
        Path("/proc/sys/vm/drop_caches").write_text("1")
        for name, pod in pods.items():
            pod.containers[name].kill()
            pod.containers[name].ended()
            one = pod.start(name)
            eventually(lambda one=one: one.probe("startupProbe"), 60, one.log)
    clients = [node.run(f"many-{n}", {}, {}).container("main").client() for n in range(TENANTS)]
    for client in clients:
        client.ok("alloc 2097152")
        client.close()
    assert pods["agent"].containers["agent"].probe("livenessProbe")
    for pod in pods.values():
        for name, one in pod.containers.items():
            limit = int(one.spec["resources"]["limits"]["memory"].removesuffix("Mi")) << 20
            peak = one.memory_peak_bytes()
            mapped = f", {one.facts()['VmHWM']} mapped" if one.status[3] == 1 else ""
            print(f"{name} {peak / MIB:.1f} MiB of {limit // MIB}{mapped}, {TENANTS} tenants")
            assert peak < limit, name  # at the limit the kernel reclaims, or kills


@pytest.mark.flaky(reruns=0)  # the node is detached after this test
def test_a_detach_removes_fgpu_s_folders_from_the_node(node: node_kit.Node, pods: dict[str, node_kit.Pod]) -> None:
    left = [Path("/run/fgpu"), Path("/sys/fs/bpf/fgpu"), Path("/var/lib/fgpu"), Path("/run/cdi")]
    assert [path.exists() for path in left] == [True] * 4
    node.end_tenants()
    pods["agent"].end()
    node.objects |= {(one["kind"], one["metadata"]["name"]): one for one in node_kit.manifests(DETACH)}
    pod = node.make("fgpu-agent")
    parker = pod.start("parker")
    eventually(Path("/run/fgpu/parker.sock").exists, 30, parker.log)
    detach = pod.start("detach")
    eventually(lambda: "gatekeeper: exiting" in pods["gatekeeper"].containers["gatekeeper"].log, 60, detach.log)
    for _ in range(2):  # kubelet restarts it until the DaemonSet is removed: during a detach, and after one
        restarted = pods["gatekeeper"].start("gatekeeper")
        eventually(lambda one=restarted: "gatekeeper: listening" in one.log, 60, restarted.log)
        try:
            eventually(lambda: not Path("/run/fgpu").exists(), 60)
        except Timeout as error:
            error.add_note(f"{sorted(Path('/run/fgpu').rglob('*'))}\n{detach.log}\n{restarted.log}")
            raise
    pods["gatekeeper"].start("gatekeeper")
    eventually(Path("/run/fgpu/gatekeeper.lock").exists, 60, detach.log)
    pods["gatekeeper"].end()
    eventually(lambda: detach.probe("readinessProbe"), 60, detach.log)
    assert [path for path in left if path.exists()] == []
    eventually(lambda: children(parker.pid) == ["sleep"], 20, parker.log)
    assert [path for path in left if path.exists()] == []


def children(pid: int) -> list[str]:
    """Return the names of a process's children."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{child}/comm").read_text().strip() for child in found]
