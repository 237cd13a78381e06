"""ResourceClaims with the real control plane: docs/dra.md. The tests follow one another on one cluster."""

from __future__ import annotations

import json
import re
import ssl
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.cluster.cluster_kit import API, NODE, Cluster
from tests.cluster.pods_kit import CHART, REFUSED, SYSTEM, filled, pending, ready, seen, status, tenant
from tests.support.host import CONTEXT, MIB
from tests.support.sim_driver import driver_books
from tests.support.wait import eventually

DRIVER = "gpu.fgpu.dev"
ACCOUNT = "fgpu-system:fgpu-dra-driver"
STEP = 2 * MIB  # of the program that fills its limit
UID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
CALL = re.compile(r'^I\d{4} (\S+) .*"(Calling|Done calling) NodePrepareResources rpc" (.*)$', re.MULTILINE)
COUNTED = re.compile(
    r'^dra_grpc_operations_duration_seconds_count\{.*"OK".*/NodePrepareResources".*\} (\d+)$', re.MULTILINE
)
CLAIMS_IN_USE = re.compile(r'^dra_resource_claims_in_use\{driver_name="<any>"\} (\d+)$', re.MULTILINE)

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


def claim_files() -> list[str]:
    """Return the names of the CDI specifications of claims."""
    return sorted(path.name for path in Path("/run/cdi").glob("fgpu.dev-claim_*"))


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
    assert memory["requestPolicy"] == {"default": memory["value"], "validRange": {"min": "64Mi", "step": "1"}}
    assert compute == {"value": "100", "requestPolicy": {"default": "0", "validRange": {"min": "0", "step": "1"}}}


def test_a_pod_has_what_its_claim_consumes(cluster: Cluster) -> None:
    """The limit is rounded down to mebibytes. Memory beyond it is refused."""
    cluster.apply(template("odd", memory="1500000Ki", compute="30"), claiming("one", "odd"))
    got = filled(cluster, "one")
    (consumed,) = (result["consumedCapacity"] for result in results(cluster).values())
    assert consumed["memory"] in ("1500000Ki", "1536M"), "as it was written, and from Kubernetes 1.37 in a normal form"
    assert consumed["compute"] == "30"
    limit = 1464 * MIB
    assert got == (limit - CONTEXT) // STEP * STEP
    one = seen(cluster, "one")
    assert one
    (device,) = one["devices"]
    assert (device["limit_bytes"], device["used_bytes"]) == (limit, got + CONTEXT)
    assert "1464MiB" in cluster.kubectl("exec", "one", "--", "nvidia-smi")
    said = cluster.kubectl("exec", "one", "--", "fill", "--step", "2MiB", check=False)
    assert REFUSED.search(said), said


def test_a_claim_s_status_has_what_it_was_granted_and_the_driver_may_change_nothing_else(cluster: Cluster) -> None:
    (claim,) = eventually(lambda: [one for one in cluster.get("resourceclaim")["items"] if shown(one)], 30, "a status")
    (device,), (allocated,) = shown(claim), claim["status"]["allocation"]["devices"]["results"]
    assert device["data"] == {"memory": "1464MiB", "compute": "30%"}
    assert [device[key] for key in ("driver", "pool", "device", "shareID")] == [
        allocated[key] for key in ("driver", "pool", "device", "shareID")
    ]
    own = {key: value for key, value in device.items() if key != "data"}
    written = {"devices": [own]}
    assert as_the_driver(claim, written) == "patched"
    others = {"devices": [own, {**own, "driver": "gpu.example.com"}]}
    for changed in ({"allocation": None}, {"reservedFor": []}, others):
        said = as_the_driver(claim, changed)
        assert "forbidden" in said.lower() or "must be an allocated device" in said, (changed, said)
    assert "forbidden" in as_the_driver(claim, {"devices": []}, node="node-2").lower()


def test_the_policy_refuses_what_versions_before_1_36_do_not_check(cluster: Cluster) -> None:
    """Here an account with all rights that Kubernetes 1.36 checks by itself."""
    rules = [{"apiGroups": ["resource.k8s.io"], "resources": ["resourceclaims/binding"], "verbs": ["patch"]}]
    rules += [{**rules[0], "resources": ["resourceclaims/driver"], "verbs": ["arbitrary-node:patch"]}]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "more"}}
    cluster.apply(role | {"rules": rules})
    cluster.kubectl("create", "clusterrolebinding", "more", "--clusterrole=more", f"--serviceaccount={ACCOUNT}")
    (claim,) = cluster.get("resourceclaim")["items"]
    for changed in ({"allocation": None, "reservedFor": [], "devices": []}, {"reservedFor": []}):
        said = as_the_driver(claim, changed)
        assert "the driver may not change what is allocated" in said, (changed, said)
    said = as_the_driver(claim, {"devices": []}, node="node-2")
    assert "the driver may write only devices of gpu.fgpu.dev and of its own node" in said, said
    assert as_the_driver(claim, {"devices": []}) == "patched"
    cluster.kubectl("delete", "clusterrolebinding,clusterrole", "more")
    gone(cluster, "one")


def shown(claim: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the status of a claim says of devices."""
    return list(claim.get("status", {}).get("devices", ()))


def as_the_driver(claim: dict[str, Any], status: dict[str, Any], node: str = NODE) -> str:
    """Change the status of a claim with the driver's account on a node, and return the answer.

    kubectl would first read the status, which the account may not do.
    """
    place = f"/apis/resource.k8s.io/v1/namespaces/default/resourceclaims/{claim['metadata']['name']}/status"
    request = urllib.request.Request(API + place, json.dumps({"status": status}).encode())
    request.method = "PATCH"
    request.add_header("Authorization", "Bearer admin-token")
    request.add_header("Content-Type", "application/merge-patch+json")
    request.add_header("Impersonate-User", f"system:serviceaccount:{ACCOUNT}")
    request.add_header("Impersonate-Extra-authentication.kubernetes.io%2Fnode-name", node)
    try:
        with urllib.request.urlopen(request, context=ssl._create_unverified_context(), timeout=60):
            return "patched"
    except urllib.error.HTTPError as error:
        return str(json.loads(error.read())["message"])


def test_the_scheduler_packs_ten_claims_on_a_device_and_the_eleventh_waits(cluster: Cluster) -> None:
    before, names = the_slice(cluster), {f"share-{number}" for number in range(11)}
    cluster.apply(template("tenth", memory="1536Mi", compute="10"), *(claiming(name, "tenth") for name in names))
    eventually(lambda: len(results(cluster)) == 10, 60, "ten allocations")
    first = results(cluster)
    assert len({result["device"] for result in first.values()}) == 1
    assert {filled(cluster, name) for name in first} == {1536 * MIB - CONTEXT}
    (waiting,) = names - set(first)
    eventually(lambda: "cannot allocate all claims" in pending(cluster).get(waiting, ""), 30, "the reason")
    shown = {one["pod"]: one["devices"][0]["limit_bytes"] for one in status(cluster)["tenants"] if one["pod"] in names}
    assert shown == dict.fromkeys(first, 1536 * MIB)
    ended = min(first)
    cluster.kubectl("delete", "pod", ended)
    assert filled(cluster, waiting) == 1536 * MIB - CONTEXT, "the share of the deleted pod is free again"
    assert set(results(cluster)) == names - {ended}
    assert len(claim_files()) == 10
    assert the_slice(cluster) == before
    gone(cluster, *(names - {ended}))


def gone(cluster: Cluster, *names: str) -> None:
    """Delete pods, and wait until their claims, files and tenants are gone."""
    cluster.kubectl("delete", "pod", *names)
    eventually(lambda: not set(results(cluster)) & set(names), 60, "the end of the claims")
    eventually(lambda: not {one["pod"] for one in status(cluster)["tenants"]} & set(names), 60, "the end of tenants")


def test_claims_that_have_ended_leave_nothing(cluster: Cluster) -> None:
    assert (cluster.get("resourceclaim")["items"], claim_files(), driver_books()) == ([], [], [])
    assert CLAIMS_IN_USE.findall(metrics(cluster)) == ["0"]
    assert "Error receiving from WatchResources stream" not in (cluster.logs / "kubelet").read_text()


def test_the_time_of_a_preparation(cluster: Cluster) -> None:
    """Kubelet measures each call of the driver."""
    took = preparations(cluster)
    counted = COUNTED.search(metrics(cluster))
    assert counted
    assert len(took) == int(counted[1]) == 12
    print_times("a claim each, ten at the same time", took)
    names = [f"single-{number}" for number in range(20)]
    cluster.apply(template("single", memory="768Mi"))
    for name in names:
        cluster.apply(claiming(name, "single"))
        assert filled(cluster, name)
    print_times("a claim each, one after another", preparations(cluster)[12:])
    gone(cluster, *names)


def preparations(cluster: Cluster) -> list[float]:
    """Return the seconds of each call of NodePrepareResources, in the order of their ends."""
    text = (cluster.logs / "kubelet").read_text()
    begun, took = dict[str, datetime](), list[float]()
    for at, word, rest in CALL.findall(text):
        when, uids = datetime.strptime(at, "%H:%M:%S.%f"), set(re.findall(UID, rest))
        if word == "Calling":
            begun |= dict.fromkeys(uids, when)
        else:
            (since,) = {begun.pop(uid) for uid in uids & set(begun)}
            took.append((when - since).total_seconds())
    assert not begun
    return took


def print_times(what: str, seconds: list[float]) -> None:
    """Print the median and the 99th percentile of calls of NodePrepareResources."""
    seconds.sort()
    p99 = seconds[len(seconds) * 99 // 100]
    shown = f"p50 {median(seconds) * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms"
    print(f"NodePrepareResources, {len(seconds)} calls, {what}: {shown}")


def metrics(cluster: Cluster) -> str:
    """Return kubelet's metrics."""
    return cluster.kubectl("get", "--raw", f"/api/v1/nodes/{NODE}/proxy/metrics")


@pytest.mark.timeout(1500)
def test_a_thousand_claims_leave_nothing(cluster: Cluster) -> None:
    """A hundred pods with ten claims each. The scheduler places as many as fit on the device, and the others wait."""
    before, pods = len(preparations(cluster)), [claiming(f"many-{number}", "least") for number in range(100)]
    for pod in pods:
        names = [f"claim-{number}" for number in range(10)]
        pod["spec"] |= {"restartPolicy": "OnFailure"}
        pod["spec"]["resourceClaims"] = [{"name": name, "resourceClaimTemplateName": "least"} for name in names]
        pod["spec"]["containers"][0] |= {
            "command": ["sh", "-c", "exit 0"], "resources": {"claims": [{"name": name} for name in names]},
        }  # fmt: skip
    cluster.apply(template("least", memory="64Mi"), *pods)

    done = "--for=jsonpath={.status.phase}=Succeeded"
    cluster.kubectl("wait", done, "pod", "--all", "--timeout=480s", seconds=500)
    cluster.kubectl("delete", "pod", "--all", seconds=240)
    eventually(lambda: not cluster.get("resourceclaim")["items"] and not claim_files(), 240, "the end of all claims")
    eventually(lambda: CLAIMS_IN_USE.findall(metrics(cluster)) == ["0"], 60, "no claim in kubelet")
    eventually(lambda: not [t for t in status(cluster)["tenants"] if t["pod"].startswith("many-")], 60, "no tenant")
    took = preparations(cluster)[before:]
    assert len(took) == 100
    print_times("ten claims each", took)


def test_claims_are_prepared_again_after_restarts_and_a_boot(cluster: Cluster) -> None:
    """Running programs go on while kubelet, containerd and the driver restart. A boot empties the folder of claims."""
    cluster.apply(claiming("kept", "tenth"))
    assert filled(cluster, "kept") == 1536 * MIB - CONTEXT
    before, (process,) = the_slice(cluster), driver_books()
    assert before
    cluster.restart_services()
    cluster.kubectl("delete", "pod", *SYSTEM, "--selector", "app.kubernetes.io/component=dra-driver")
    ready(cluster)
    eventually(lambda: (the_slice(cluster) or {}).get("devices") == before["devices"], 60, "the slice")
    assert driver_books() == [process]
    cluster.apply(claiming("next", "tenth"))
    assert filled(cluster, "next") == 1536 * MIB - CONTEXT
    cluster.boot()
    ready(cluster)
    eventually(lambda: [one["bytes"] for one in driver_books()] == [1536 * MIB] * 2, 180, "the programs")
    gone(cluster, "kept", "next")
    assert claim_files() == []


def test_kubelet_removes_the_slice_after_the_uninstallation(cluster: Cluster) -> None:
    cluster.helm("upgrade", "fgpu", CHART, *SYSTEM, "--reuse-values", "--set", "detach=true")
    cluster.kubectl("rollout", "status", "daemonset/fgpu-agent", *SYSTEM, "--timeout=150s")
    cluster.helm("uninstall", "fgpu", *SYSTEM)
    eventually(lambda: not cluster.pods_of_fgpu() and not the_slice(cluster), 120, "the end of pods and slice")
