"""Claims of NVIDIA's DRA driver with the real scheduler and kubelet: docs/nvidia-dra.md.

The driver is a stand-in (nvidia_driver.py). The tests follow one another on one cluster.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.cluster_kit import NODE, Cluster
from tests.cluster.nvidia_driver import DRIVER, HOST
from tests.cluster.pods_kit import CHART, REFUSED, SYSTEM, filled, pending, ready, status, tenant, with_shim
from tests.support.host import CONTEXT, GIB, ROOT
from tests.support.sim_driver import driver_books
from tests.support.wait import eventually

FOLDER = Path("/var/lib/kubelet")
FILE = FOLDER / "plugins" / DRIVER / "checkpoint.json"
PAGE = ROOT / "docs/nvidia-dra.md"
API = "resource.k8s.io/v1"

pytestmark = [pytest.mark.flaky(reruns=0), pytest.mark.timeout(600)]  # a repeated test finds another cluster


@pytest.fixture(scope="module")
def driver(cluster: Cluster) -> Iterator[None]:
    """Run the driver, and publish its device as its chart's value `consumableShares: memory` does."""
    (uuid,) = (one["name"] for one in json.loads(HOST.read_text())["devices"] if one["name"].startswith("GPU-"))
    module = ("-m", "tests.cluster.nvidia_driver", str(FOLDER), uuid)
    cluster.begin("nvidia-driver", *module, program=sys.executable)
    memory = {"default": "16Gi", "validRange": {"min": "1Mi", "max": "16Gi", "step": "1Mi"}}
    device = {
        "name": "gpu-0",
        "allowMultipleAllocations": True,
        "attributes": {"type": {"string": "gpu"}, "uuid": {"string": uuid}},
        "capacity": {"memory": {"value": "16Gi", "requestPolicy": memory}},
    }
    pool = {"name": NODE, "generation": 1, "resourceSliceCount": 1}
    spec = {"driver": DRIVER, "nodeName": NODE, "pool": pool, "devices": [device]}
    kind = {"selectors": [{"cel": {"expression": f"device.driver == '{DRIVER}'"}}]}
    eventually(FILE.exists, 20, "the driver")
    cluster.apply(
        {"apiVersion": API, "kind": "ResourceSlice", "metadata": {"name": f"{NODE}-{DRIVER}"}, "spec": spec},
        {"apiVersion": API, "kind": "DeviceClass", "metadata": {"name": DRIVER}, "spec": kind},
    )
    yield
    cluster.end("nvidia-driver")


def requests(**sizes: str) -> dict[str, Any]:
    """Return the specification of a claim for parts of devices, by the name of each request."""
    return {
        "devices": {
            "requests": [
                {"name": name, "exactly": {"deviceClassName": DRIVER, "capacity": {"requests": {"memory": size}}}}
                for name, size in sizes.items()
            ]
        }
    }


def template(name: str, **sizes: str) -> dict[str, Any]:
    """Return a template of claims."""
    head = {"apiVersion": API, "kind": "ResourceClaimTemplate", "metadata": {"name": name}}
    return head | {"spec": {"spec": requests(**sizes)}}


def claiming(name: str, *templates: str, claim: str = "") -> dict[str, Any]:
    """Return a pod that allocates as much as it can, with a claim of each template, and an existing claim."""
    pod = with_shim(tenant(name))
    named: list[dict[str, str]] = [{"name": of, "resourceClaimTemplateName": of} for of in templates]
    named += [{"name": claim, "resourceClaimName": claim}] if claim else []
    pod["spec"]["resourceClaims"] = named
    pod["spec"]["containers"][0]["resources"] = {"claims": [{"name": one["name"]} for one in named]}
    return pod


def limits(cluster: Cluster) -> dict[str, int]:
    """Return the limit of each pod with a claim, in GiB."""
    tenants = [one for one in status(cluster)["tenants"] if one["pod"] and not one["container"]]
    return {one["pod"]: one["devices"][0]["limit_bytes"] // GIB for one in tenants}


def explained(cluster: Cluster, pod: str) -> str:
    """Return the text of `fgpu explain` in one line, or its error while no agent runs."""
    return " ".join(cluster.fgpu("explain", f"pod/default/{pod}", check=False).split())


@pytest.mark.usefixtures("namespace", "driver")
def test_a_pod_has_what_its_claim_has_consumed(cluster: Cluster) -> None:
    """The claim is that of the page. kubelet's folder is not this machine's, so it is set."""
    folder = f"settings.kubeletFolder={cluster.work}{FOLDER}"
    cluster.helm("install", "fgpu", CHART, *SYSTEM, "--set", folder)
    ready(cluster)
    (text,) = re.findall(r'```yaml title="four-gib.yaml"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    cluster.apply(yaml.safe_load(text), claiming("one", "four-gib"))
    assert filled(cluster, "one") == 4 * GIB - CONTEXT
    assert limits(cluster) == {"one": 4}
    said = explained(cluster, "one")
    assert re.search(rf"note: claim default/one-four-gib-\w+ of {DRIVER}: 4GiB of device 0", said), said
    assert "level default/one (claim)" in said
    assert "4096MiB" in cluster.kubectl("exec", "one", "--", "nvidia-smi")


def test_containers_of_a_pod_have_the_claim_together(cluster: Cluster) -> None:
    """The second container starts when the first has the whole claim."""
    pod = claiming("two", "four-gib")
    (main,) = pod["spec"]["containers"]
    pod["spec"]["containers"].append(main | {"name": "side", "command": ["sleep", "100000"]})
    cluster.apply(pod)
    eventually(lambda: "CUDA_ERROR_OUT_OF_MEMORY" in logs(cluster, "two"), 60, "the first container")
    assert f"admitted {4 * GIB - CONTEXT} bytes" in logs(cluster, "two")
    said = cluster.kubectl("exec", "two", "--container", "side", "--", "fill", "--step", "2MiB", check=False)
    assert REFUSED.search(said), said
    cluster.kubectl("delete", "pod", "two")


def logs(cluster: Cluster, pod: str) -> str:
    """Return the output of a pod's first container."""
    return cluster.kubectl("logs", pod, "--container", "main", check=False)


def test_claims_and_requests_are_added_up_and_the_scheduler_counts_them(cluster: Cluster) -> None:
    """Two claims; one claim with two requests; one claim that two pods share. With `one`, 13 of 16 GiB are booked."""
    shared = {"apiVersion": API, "kind": "ResourceClaim", "metadata": {"name": "shared"}, "spec": requests(gpu="2Gi")}
    cluster.apply(template("one-gib", gpu="1Gi"), template("pair", first="1Gi", second="1Gi"), shared)
    cluster.apply(claiming("several", "four-gib", "one-gib"), claiming("requests", "pair"))
    cluster.apply(claiming("left", claim="shared"), claiming("right", claim="shared"))
    expected = {"several": 5, "requests": 2, "left": 2, "right": 2}
    assert {name: (filled(cluster, name) + CONTEXT) // GIB for name in expected} == expected
    assert limits(cluster) == expected | {"one": 4}
    assert explained(cluster, "several").count("5GiB of device 0") == 1
    cluster.apply(claiming("late", "four-gib"))
    eventually(lambda: "cannot allocate all claims" in pending(cluster).get("late", ""), 30, "the reason")
    cluster.kubectl("delete", "pod", "several")
    assert filled(cluster, "late") == 4 * GIB - CONTEXT, "the claims of the deleted pod are free again"
    cluster.kubectl("delete", "pod", "requests", "left", "right", "late")


def test_a_pod_keeps_its_limit_while_the_agent_starts_without_the_driver_s_file(cluster: Cluster) -> None:
    """The agent's pod is not ready before the claim is known."""
    FILE.rename(FILE.with_name("away"))
    cluster.kubectl("delete", "pod", *SYSTEM, "--selector", "app.kubernetes.io/component=agent")
    eventually(lambda: "is not known" in explained(cluster, "one"), 90, "the next agent")
    assert limits(cluster) == {"one": 4}
    said = cluster.kubectl("exec", "one", "--", "fill", "--step", "2MiB", check=False)
    assert REFUSED.search(said), said
    found = cluster.fgpu("doctor", "--config", "/etc/fgpu/settings/agent.yaml", check=False)
    assert "FAIL  nvidia claims: " in found, found
    (agents,) = cluster.get("daemonset", *SYSTEM, "--selector", "app.kubernetes.io/component=agent")["items"]
    assert agents["status"].get("numberReady", 0) == 0
    FILE.with_name("away").rename(FILE)
    ready(cluster)
    assert "4GiB of device 0" in explained(cluster, "one")


def test_claims_that_have_ended_leave_nothing(cluster: Cluster) -> None:
    cluster.kubectl("delete", "pod", "one")
    eventually(lambda: not limits(cluster), 60, "the end of tenants")
    eventually(lambda: not json.loads(FILE.read_text())["v2"]["preparedClaims"], 60, "the end of claims")
    assert driver_books() == []
    cluster.kubectl("delete", "resourceclaim", "shared")
    cluster.kubectl("delete", "deviceclass", DRIVER)
    cluster.kubectl("delete", "resourceslice", f"{NODE}-{DRIVER}")
    cluster.helm("upgrade", "fgpu", CHART, *SYSTEM, "--reuse-values", "--set", "detach=true")
    cluster.kubectl("rollout", "status", "daemonset/fgpu-agent", *SYSTEM, "--timeout=150s")
    cluster.helm("uninstall", "fgpu", *SYSTEM)
    eventually(lambda: not cluster.pods_of_fgpu(), 120, "the end of the pods")
