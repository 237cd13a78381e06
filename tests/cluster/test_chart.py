"""The chart in a cluster, by the commands of docs/kubernetes.md, from the installation to the uninstallation.

The tests follow one another on one cluster, and each ends without pods of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.cluster_kit import NODE, Cluster
from tests.cluster.image_kit import Agent
from tests.cluster.pods_kit import (
    CHART,
    REFUSED,
    SYSTEM,
    filled,
    pending,
    ready,
    seen,
    status,
    tenant,
    with_driver,
    with_shim,
)
from tests.support.host import CONTEXT, GIB, MIB, cgroup_root
from tests.support.sim_driver import driver_books
from tests.support.wait import eventually

SHARE, SIZE = "fgpu.dev/2gib-25pct", 2 * GIB
VALUES = """
devicePlugin:
  enabled: true
  profiles:
    - {share: 2gib-25pct, count: 3}
"""
POLICIES = """
policies:
  10-notebooks.yaml: |
    apiVersion: fgpu.dev/v1alpha1
    kind: GpuPolicy
    metadata: {name: notebooks}
    spec:
      selector: {namespace: [default], matchLabels: {tier: notebook}}
      memory: {limit: 1GiB, max: 3GiB}
"""

pytestmark = [pytest.mark.flaky(reruns=0), pytest.mark.timeout(600)]  # a repeated test finds another cluster


@pytest.mark.usefixtures("namespace")
def test_the_chart_is_installed(cluster: Cluster) -> None:
    cluster.helm("install", "fgpu", CHART, *SYSTEM)
    ready(cluster)
    assert status(cluster)["unenforced"] == ""
    said = cluster.fgpu("doctor", "--config", "/etc/fgpu/settings/agent.yaml", check=False)
    assert [line for line in said.splitlines() if not line.startswith("ok ")] == [], said


def test_the_device_plugin_offers_its_profiles(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(VALUES)
    cluster.helm("upgrade", "fgpu", CHART, *SYSTEM, "--reuse-values", "--values", tmp_path / "values.yaml")
    ready(cluster)
    eventually(lambda: cluster.get("node", NODE)["status"]["allocatable"].get(SHARE) == "3", 60, "the profile")


def test_a_pod_is_charged_in_its_cgroup_of_version_2(cluster: Cluster) -> None:
    """The limit holds to the byte, by the driver's own figures, and `nvidia-smi` in the pod shows it."""
    cluster.apply(tenant("first", SHARE))
    assert filled(cluster, "first") == SIZE - CONTEXT
    (process,) = driver_books()
    facts = cluster.get("pod", "first")
    (own,) = [line for line in Path(f"/proc/{process['pid']}/cgroup").read_text().splitlines() if line[:3] == "0::"]
    container = facts["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    assert own.endswith(f"/pod{facts['metadata']['uid']}/{container}"), own
    one = seen(cluster, "first")
    assert one
    path = cgroup_root() / own.removeprefix("0::/")
    assert (one["path"], one["cgroup"]) == (own.removeprefix("0::"), path.stat().st_ino)
    (device,) = one["devices"]
    assert (device["limit_bytes"], device["used_bytes"], process["bytes"]) == (SIZE, SIZE, SIZE)
    assert f"{SIZE // MIB}MiB" in cluster.kubectl("exec", "first", "--", "nvidia-smi")


def test_a_pod_beyond_the_profile_s_count_waits(cluster: Cluster) -> None:
    names = [f"wide-{number}" for number in range(3)]
    cluster.apply(*(tenant(name, SHARE) for name in names))
    waiting = eventually(lambda: pending(cluster), 60, "a pending pod")
    assert [f"Insufficient {SHARE}" in why for why in waiting.values()] == [True], waiting
    for name in set(names) - set(waiting):
        assert filled(cluster, name) == SIZE - CONTEXT
    cluster.kubectl("delete", "pod", "first")
    assert filled(cluster, *waiting) == SIZE - CONTEXT, "the share of the deleted pod is free again"
    cluster.kubectl("delete", "pod", *names)
    eventually(lambda: not driver_books(), 20, "the end of the programs")


def test_labels_select_a_policy_and_annotations_ask_for_more(cluster: Cluster, tmp_path: Path) -> None:
    """The ConfigMap is installed without a restart."""
    (tmp_path / "values.yaml").write_text(POLICIES)
    before = cluster.pods_of_fgpu()
    cluster.helm("upgrade", "fgpu", CHART, *SYSTEM, "--reuse-values", "--values", tmp_path / "values.yaml")
    eventually(lambda: status(cluster)["policies"]["count"] == 1, 90, "the policy")
    assert cluster.pods_of_fgpu() == before
    labels, asked = {"tier": "notebook"}, {"plain": "", "asks": "2GiB", "greedy": "8GiB"}
    for name, memory in asked.items():
        notes = {"fgpu.dev/memory": memory} if memory else {}
        cluster.apply(with_driver(with_shim(tenant(name, labels=labels, annotations=notes))))
    got = {name: filled(cluster, name) + CONTEXT for name in asked}
    assert got == {"plain": GIB, "asks": 2 * GIB, "greedy": 3 * GIB}
    assert "the policy allows 3GiB" in " ".join(cluster.fgpu("explain", "pod/default/greedy").split())
    cluster.kubectl("delete", "pod", *asked)


def test_a_limit_holds_while_the_agent_s_pod_is_deleted(cluster: Cluster) -> None:
    cluster.apply(tenant("first", SHARE))
    filled(cluster, "first")
    before = seen(cluster, "first")
    cluster.kubectl("delete", "pod", *SYSTEM, "--selector", "app.kubernetes.io/component=agent", "--wait=false")
    refused = 0
    while not refused or not is_ready(cluster):
        said = cluster.kubectl("exec", "first", "--", "fill", "--step", "2MiB", check=False)
        assert REFUSED.search(said), said
        refused += 1
    after = eventually(lambda: seen(cluster, "first"), 30, "the tenant")
    assert before
    assert (after["cgroup"], after["processes"]) == (before["cgroup"], before["processes"])
    assert [device["used_bytes"] for device in after["devices"]] == [SIZE]


def is_ready(cluster: Cluster) -> bool:
    """Return whether the pod that replaces the agent's is ready."""
    (one,) = cluster.get("daemonset", *SYSTEM, "--selector", "app.kubernetes.io/component=agent")["items"]
    return bool(one["status"].get("numberReady")) and not any(
        "deletionTimestamp" in pod["metadata"] for pod in cluster.get("pod", *SYSTEM)["items"]
    )


def test_an_upgrade_replaces_every_pod_and_no_running_program(cluster: Cluster, agent: Agent) -> None:
    cluster.load(agent.version("docker.io/library/fgpu:0.1.1", "second"))
    before = cluster.pods_of_fgpu()
    (process,) = driver_books()
    cluster.helm("upgrade", "fgpu", CHART, *SYSTEM, "--reuse-values", "--set", "image.tag=0.1.1")
    ready(cluster)
    eventually(lambda: not set(before) & set(cluster.pods_of_fgpu()), 60, "the end of the pods before")
    assert set(cluster.pods_of_fgpu().values()) == {"fgpu:0.1.1"}
    assert driver_books() == [process]
    said = cluster.kubectl("exec", "first", "--", "fill", "--step", "2MiB", check=False)
    assert REFUSED.search(said), said
    eventually(lambda: cluster.get("node", NODE)["status"]["allocatable"].get(SHARE) == "3", 60, "the profile")


def test_a_drain_ends_the_pods_and_frees_their_memory(cluster: Cluster) -> None:
    cluster.kubectl("drain", NODE, "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=60s")
    eventually(lambda: not driver_books(), 30, "the end of the program")
    eventually(lambda: not seen(cluster, "first"), 30, "the end of the tenant")
    cluster.kubectl("uncordon", NODE)
    cluster.apply(tenant("second", SHARE))
    assert filled(cluster, "second") == SIZE - CONTEXT


def test_a_restart_of_kubelet_and_containerd_changes_no_pod(cluster: Cluster) -> None:
    """The device plugin registers again."""
    before, (process,) = cluster.pods_of_fgpu(), driver_books()
    cluster.restart_services()
    eventually(lambda: cluster.get("node", NODE)["status"]["allocatable"].get(SHARE) == "3", 60, "the profile")
    assert cluster.pods_of_fgpu() == before
    assert driver_books() == [process]
    cluster.apply(tenant("third", SHARE))
    assert filled(cluster, "third") == SIZE - CONTEXT
    cluster.kubectl("delete", "pod", "second", "third")
    eventually(lambda: not driver_books(), 20, "the end of the programs")


def test_a_pod_has_its_limit_again_after_the_node_was_booted(cluster: Cluster) -> None:
    """All processes, /run and the pins are gone. fgpu's pods and the user's start again, in any order."""
    template = tenant("work", SHARE)
    template["metadata"] = {"labels": {"app": "work"}}
    spec = {"replicas": 1, "selector": {"matchLabels": {"app": "work"}}, "template": template}
    for key in ("apiVersion", "kind"):
        del template[key]
    cluster.apply({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "work"}, "spec": spec})
    eventually(lambda: books_of(SIZE), 60, "the program")
    cluster.boot()
    ready(cluster)
    eventually(lambda: books_of(SIZE), 120, "the program")
    cluster.kubectl("rollout", "status", "deployment/work", "--timeout=60s")
    cluster.kubectl("delete", "deployment", "work")
    cluster.kubectl("delete", "pod", "--all")


def books_of(size: int) -> bool:
    """Return whether one process has memory, of that size."""
    return [process["bytes"] for process in driver_books()] == [size]


def test_the_uninstallation_leaves_no_limit_and_no_folder(cluster: Cluster) -> None:
    left = [Path("/run/fgpu"), Path("/sys/fs/bpf/fgpu")]
    assert [path.exists() for path in left] == [True] * 2
    assert list(Path("/run/cdi").iterdir())
    cluster.helm("upgrade", "fgpu", CHART, *SYSTEM, "--reuse-values", "--set", "detach=true")
    cluster.kubectl("rollout", "status", "daemonset/fgpu-agent", *SYSTEM, "--timeout=150s")
    cluster.helm("uninstall", "fgpu", *SYSTEM)
    eventually(lambda: not cluster.pods_of_fgpu(), 60, "the end of fgpu's pods")
    assert [path for path in left if path.exists()] == []
    assert not Path("/run/cdi").exists() or not list(Path("/run/cdi").iterdir())
    assert {path.name for path in Path("/var/lib/fgpu").iterdir()} == {"usage.db"}, "the page names what stays"
    eventually(lambda: cluster.get("node", NODE)["status"]["allocatable"].get(SHARE) in (None, "0"), 60, "no profile")
    cluster.apply(with_driver(tenant("free")))
    assert filled(cluster, "free") > 4 * SIZE, "a pod is limited without fgpu"
    cluster.kubectl("delete", "pod", "free")
    eventually(lambda: not driver_books(), 20, "the end of the program")
