"""ResourceClaims with the real control plane: docs/dra.md. The tests follow one another on one cluster."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.cluster_kit import NODE, Cluster
from tests.cluster.pods_kit import CHART, REFUSED, SYSTEM, filled, ready, seen, status, tenant
from tests.support.host import CONTEXT, MIB
from tests.support.wait import eventually

DRIVER = "gpu.fgpu.dev"
STEP = 2 * MIB  # of the program that fills its limit

pytestmark = [pytest.mark.flaky(reruns=0), pytest.mark.timeout(600)]  # a repeated test finds another cluster


def template(name: str, **capacity: str) -> dict[str, Any]:
    """Return a template of claims for a share of one device."""
    exactly = {"deviceClassName": DRIVER, "capacity": {"requests": capacity}}
    spec = {"devices": {"requests": [{"name": "gpu", "exactly": exactly}]}}
    head = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaimTemplate", "metadata": {"name": name}}
    return head | {"spec": {"spec": spec}}


def claiming(name: str, of: str) -> dict[str, Any]:
    """Return a pod that fills the share of a claim. `of`: the name of the claim's template."""
    pod = tenant(name)
    pod["spec"]["resourceClaims"] = [{"name": "gpu", "resourceClaimTemplateName": of}]
    pod["spec"]["containers"][0]["resources"] = {"claims": [{"name": "gpu"}]}
    return pod


def results(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Return what is allocated to the claim of each pod."""
    found = {}
    for claim in cluster.get("resourceclaim")["items"]:
        if allocation := claim.get("status", {}).get("allocation"):
            (result,) = allocation["devices"]["results"]
            found[claim["metadata"]["ownerReferences"][0]["name"]] = result
    return found


def the_slice(cluster: Cluster) -> dict[str, Any] | None:
    """Return the specification of the node's slice."""
    found = [one["spec"] for one in cluster.get("resourceslice")["items"] if one["spec"]["driver"] == DRIVER]
    return found[0] if found else None


@pytest.mark.usefixtures("namespace")
def test_the_driver_publishes_a_device_that_claims_divide(cluster: Cluster) -> None:
    cluster.helm("install", "fgpu", CHART, *SYSTEM, "--set", "dra.enabled=true")
    ready(cluster)
    assert [name for name in cluster.pods_of_fgpu() if name.startswith("fgpu-dra-driver-")]
    spec = eventually(lambda: the_slice(cluster), 60, "the slice")
    assert (spec["nodeName"], spec["pool"]["name"]) == (NODE, NODE)
    (device,) = spec["devices"]
    assert device["allowMultipleAllocations"] is True
    memory, compute = device["capacity"]["memory"], device["capacity"]["compute"]
    assert memory["requestPolicy"] == {"default": memory["value"], "validRange": {"min": "64Mi", "step": "1Mi"}}
    assert compute == {"value": "100", "requestPolicy": {"default": "0", "validRange": {"min": "0", "step": "1"}}}


def test_a_pod_has_what_its_claim_consumes(cluster: Cluster) -> None:
    """The scheduler rounds the request up to mebibytes. Memory beyond that is refused."""
    cluster.apply(template("odd", memory="1500000Ki", compute="30"), claiming("one", "odd"))
    got = filled(cluster, "one")
    (consumed,) = (result["consumedCapacity"] for result in results(cluster).values())
    assert consumed == {"memory": "1465Mi", "compute": "30"}
    limit = 1465 * MIB
    assert got == (limit - CONTEXT) // STEP * STEP
    one = seen(cluster, "one")
    assert one
    (device,) = one["devices"]
    assert (device["limit_bytes"], device["used_bytes"]) == (limit, got + CONTEXT)
    assert "1465MiB" in cluster.kubectl("exec", "one", "--", "nvidia-smi")
    said = cluster.kubectl("exec", "one", "--", "fill", "--step", "2MiB", check=False)
    assert REFUSED.search(said), said
    gone(cluster, "one")


def gone(cluster: Cluster, *names: str) -> None:
    """Delete pods, and wait until their claims, files and tenants are gone."""
    cluster.kubectl("delete", "pod", *names)
    eventually(lambda: not set(results(cluster)) & set(names), 60, "the end of the claims")
    eventually(lambda: not {one["pod"] for one in status(cluster)["tenants"]} & set(names), 60, "the end of tenants")
