"""Pods of users, and what is seen of them: in their output, by `fgpu status` and at the API server."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from tests.cluster.cluster_kit import Cluster
from tests.support.host import ROOT
from tests.support.wait import eventually

CHART = ROOT / "deploy/helm/fgpu"
PAGE = ROOT / "docs/kubernetes.md"
SYSTEM = ("--namespace", "fgpu-system")
REFUSED = re.compile(r"cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY")
ANSWER = re.compile(r"admitted (\d+) bytes, then CUDA_ERROR_OUT_OF_MEMORY")


def tenant(name: str, resource: str = "", **more: Any) -> dict[str, Any]:
    """Return a pod that allocates as much as it can, and holds it."""
    limits = {"limits": {resource: 1}} if resource else {}
    command = ["fill", "--step", "2MiB", "--hold", "100000"]
    main = {"name": "main", "image": "tenant:1", "command": command, "resources": limits}
    spec = {"terminationGracePeriodSeconds": 1, "containers": [main]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **more}, "spec": spec}


def filled(cluster: Cluster, name: str) -> int:
    """Wait until a pod was refused memory, and return the bytes that it had got before."""
    shown = eventually(lambda: ANSWER.search(cluster.kubectl("logs", name, check=False)), 60, f"the output of {name}")
    return int(shown[1])


def status(cluster: Cluster) -> dict[str, Any]:
    """Return what `fgpu status` shows on the node."""
    return dict(json.loads(cluster.fgpu("status", "--json")))


def seen(cluster: Cluster, pod: str) -> dict[str, Any] | None:
    """Return the tenant that is the pod's container."""
    return next((one for one in status(cluster)["tenants"] if one["pod"] == pod and one["container"]), None)


def ready(cluster: Cluster) -> None:
    """Wait until every DaemonSet of fgpu is rolled out."""
    for one in cluster.get("daemonset", *SYSTEM)["items"]:
        cluster.kubectl("rollout", "status", f"daemonset/{one['metadata']['name']}", *SYSTEM, "--timeout=150s")


def pending(cluster: Cluster) -> dict[str, str]:
    """Return the reason of each pod that the scheduler could not place."""
    found = {}
    for one in cluster.get("pod")["items"]:
        for condition in one["status"].get("conditions", ()):
            if (condition["type"], condition["status"]) == ("PodScheduled", "False"):
                found[one["metadata"]["name"]] = condition["message"]
    return found


def with_driver(pod: dict[str, Any]) -> dict[str, Any]:
    """Return a pod that gets the driver and all devices from NVIDIA's runtime."""
    pod["spec"]["containers"][0]["env"] = [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]
    pod["spec"]["runtimeClassName"] = "nvidia"
    return pod


def with_shim(pod: dict[str, Any]) -> dict[str, Any]:
    """Return a pod with the volumes and, in each container, the mounts that docs/kubernetes.md names."""
    (text,) = re.findall(r"^    volumes:\n(?:    .*\n)+", PAGE.read_text(), re.MULTILINE)
    fields = yaml.safe_load(text)
    pod["spec"]["volumes"] = fields["volumes"]
    for container in pod["spec"]["containers"]:
        container["volumeMounts"] = fields["volumeMounts"]
    return pod
