"""The DRA driver, from the view of kubelet, the API server and pods. Each of them, and the agent, may be away."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.commands import ask, fgpu
from tests.support.host import CONTEXT, GIB, MIB, REFUSED, SIM
from tests.support.kubernetes import dra
from tests.support.kubernetes.api_server import NODE, ApiServer
from tests.support.kubernetes.pods import Pods
from tests.support.service import Service
from tests.support.sim_driver import driver_books
from tests.support.wait import Deadline, eventually

Start = Callable[..., dra.Driver]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    """Run an API server."""
    found = ApiServer(tmp_path / "account")
    found.start()
    yield found
    found.stop()


@pytest.fixture
def node(made: Path) -> Iterator[dra.Kubelet]:
    """Return kubelet, in folders of its own."""
    folder = Path("/tmp") / f"dra-{os.getpid()}"  # a socket's path has at most 107 characters
    found = dra.Kubelet(folder, made)
    yield found
    found.stop()
    subprocess.run(["rm", "-r", folder], check=True)


@pytest.fixture
def claims_dir(tmp_path: Path) -> Path:
    """Return the folder for the CDI specifications of claims."""
    (tmp_path / "claims").mkdir()
    return tmp_path / "claims"


@pytest.fixture
def start(node: dra.Kubelet, server: ApiServer, service: Service, claims_dir: Path, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts drivers, which leave no socket."""
    drivers: list[dra.Driver] = []

    def start(*options: str) -> dra.Driver:
        folders = ["--cdi-dir", str(tmp_path / "cdi"), "--claims-dir", str(claims_dir)]
        drivers.append(dra.Driver(node.folder, tmp_path / "driver.log", server, *folders, *options))
        return drivers[-1]

    yield start
    for driver in drivers:
        if driver.process.poll() is None:
            driver.stop()
    assert not list(node.folder.rglob("*.sock"))
    service.check()


@pytest.fixture
def driver(start: Start, server: ApiServer) -> dra.Driver:
    """Run a driver that has published its devices."""
    found = start()
    eventually(server.devices, 30, "the devices")
    return found


@pytest.fixture(params=["runc", "crun"])
def pods(request: pytest.FixtureRequest, service: Service, claims_dir: Path, tmp_path: Path) -> Iterator[Pods]:
    """Return containers of each runtime."""
    found = Pods(tmp_path, request.param, [claims_dir, tmp_path / "cdi"])
    yield found
    found.close()
    eventually(lambda: not driver_books(), 20, "an empty driver")


def result(device: str, request: str = "gpu", **consumed: str) -> dict[str, Any]:
    """Return what the scheduler has allocated to a request."""
    found = {"driver": dra.DRIVER, "pool": NODE, "device": device.lower(), "request": request}
    return {**found, "consumedCapacity": consumed, "shareID": str(uuid.uuid4())} if consumed else found


def ids(answer: Any) -> list[list[str]]:
    """Return the CDI devices of each device of an answer without an error."""
    assert not answer.error
    return [list(device.cdi_device_ids) for device in answer.devices]


# -- registration ------------------------------------------------------------------------------------------------------


def test_the_driver_registers_with_kubelet(node: dra.Kubelet, driver: dra.Driver) -> None:
    """A refused registration is possible again, as it is after a restart of kubelet."""
    node.registered("not today")
    eventually(lambda: "registration with kubelet failed: not today" in driver.said(), 10, "the refusal")
    info = node.registered()
    assert (info.type, info.name, list(info.supported_versions)) == ("DRAPlugin", dra.DRIVER, ["v1.DRAPlugin"])
    assert info.endpoint == str(node.folder / "plugins/gpu.fgpu.dev/dra.sock")
    lines = Path(f"/proc/{driver.process.pid}/status").read_text().splitlines()
    assert {line.split()[1] for line in lines if line.startswith("Cap")} == {"0" * 16}


def test_removed_sockets_are_made_again(node: dra.Kubelet, driver: dra.Driver) -> None:
    node.registered()
    (node.folder / "plugins_registry/gpu.fgpu.dev-reg.sock").unlink()
    assert node.registered().name == dra.DRIVER


def test_sigterm_ends_the_driver_and_keeps_the_slice(node: dra.Kubelet, driver: dra.Driver, server: ApiServer) -> None:
    deadline = Deadline(3)
    driver.stop()
    assert not deadline.is_over()
    assert not list(node.folder.rglob("*.sock"))
    assert len(server.devices()) == 2


def test_invalid_requests_are_refused(node: dra.Kubelet, driver: dra.Driver) -> None:
    node.registered()
    with grpc.insecure_channel(f"unix:{node.folder}/plugins/gpu.fgpu.dev/dra.sock") as channel:
        call = channel.unary_unary("/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodePrepareResources")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff" * 9, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "not a valid NodePrepareResourcesRequest"


def test_a_watch_of_health_stays_open_until_the_driver_ends(node: dra.Kubelet, driver: dra.Driver) -> None:
    """Kubelet 1.36 logs an error every five seconds if the driver has no such method."""
    with grpc.insecure_channel(f"unix:{node.registered().endpoint}") as channel:
        watch = channel.unary_stream("/v1alpha1.DRAResourceHealth/NodeWatchResources")
        cancelled, stream = watch(b"", timeout=30), watch(b"", timeout=30)
        time.sleep(1)
        assert cancelled.is_active()
        cancelled.cancel()
        time.sleep(0.5)
        assert stream.is_active()
        deadline = Deadline(3)
        driver.stop()
        assert not deadline.is_over()
        assert stream.code() is grpc.StatusCode.OK


# -- the slice ---------------------------------------------------------------------------------------------------------


def test_the_slice_has_every_device_and_what_can_be_consumed(
    driver: dra.Driver, server: ApiServer, uuids: list[str]
) -> None:
    found = server.slice()
    assert found
    (owner,) = found["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Node", NODE)
    spec = found["spec"]
    assert (spec["driver"], spec["nodeName"]) == (dra.DRIVER, NODE)
    assert spec["pool"] == {"name": NODE, "generation": 1, "resourceSliceCount": 1}
    assert [device["name"] for device in spec["devices"]] == [uuid.lower() for uuid in uuids]
    for device, offered in zip(spec["devices"], ask(verb="offers")["devices"], strict=True):
        assert device["allowMultipleAllocations"] is True
        assert set(device["attributes"]) == {"uuid", "model", "driver", "sharingMode"}
        assert device["attributes"]["uuid"] == {"string": offered["uuid"]}
        assert device["attributes"]["sharingMode"] == {"string": "reserved"}
        memory, compute = device["capacity"]["memory"], device["capacity"]["compute"]
        whole = offered["capacity_bytes"] // MIB
        assert memory["value"] == (f"{whole // 1024}Gi" if whole % 1024 == 0 else f"{whole}Mi")
        assert memory["requestPolicy"] == {"default": memory["value"], "validRange": {"min": "64Mi", "step": "1"}}
        policy = {"default": "0", "validRange": {"min": "0", "step": "1"}}
        assert compute == {"value": "100", "requestPolicy": policy}


def test_a_removed_or_changed_slice_is_published_again(driver: dra.Driver, server: ApiServer) -> None:
    found = server.slice()
    assert found
    path = f"/apis/resource.k8s.io/v1/resourceslices/{found['metadata']['name']}"
    server.change(path, None)
    eventually(lambda: len(server.devices()) == 2, 20, "the slice")
    server.change(path, {**found, "spec": {**found["spec"], "devices": []}})
    eventually(lambda: len(server.devices()) == 2, 20, "the devices")
    assert server.objects[path]["spec"]["pool"]["generation"] == 2


def test_nothing_is_written_by_another_driver_with_equal_devices(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, start: Start
) -> None:
    driver.kill()
    assert list(node.folder.rglob("*.sock")), "a killed driver cannot remove its sockets"
    server.writes.clear()
    start()
    eventually(lambda: node.registered().name == dra.DRIVER, 20, "the registration")
    answer = node.prepare(server.claim("late", result(server.devices()[0]["name"], memory="1Gi")))
    assert ids(answer[0])
    assert server.writes == []


def test_a_cluster_without_consumable_capacity_is_reported(server: ApiServer, start: Start, node: dra.Kubelet) -> None:
    """The API server drops the field. A device is allocated to one claim as a whole, and has no consumedCapacity."""
    server.kept_fields = {"name", "attributes", "capacity"}
    driver = start()
    eventually(lambda: "enable the feature gate DRAConsumableCapacity" in driver.said(), 20, "a warning")
    device = server.devices()[0]
    (answer,) = node.prepare(server.claim("whole", result(device["name"])))
    assert ids(answer)
    assert len(server.writes) == 1, "the form that the API server keeps is accepted"


def test_devices_are_published_once_the_api_server_answers(server: ApiServer, start: Start) -> None:
    server.stop()
    driver = start()
    eventually(lambda: "the ResourceSlice cannot be published: the API server" in driver.said(), 20, "the failure")
    server.refusing = 503, "starting"
    server.start()
    eventually(lambda: "the API server answers 503: starting" in driver.said(), 30, "the other failure")
    server.refusing = None
    eventually(lambda: len(server.devices()) == 2, 40, "the devices")


def test_a_device_with_an_xid_is_not_published(driver: dra.Driver, server: ApiServer, uuids: list[str]) -> None:
    subprocess.run([SIM / "fgpu-simd", "--fault", "xid=79:1"], check=True, timeout=10)
    try:
        only = [uuids[0].lower()]
        eventually(lambda: [device["name"] for device in server.devices()] == only, 30, "one device")
    finally:
        subprocess.run([SIM / "fgpu-simd", "--fault", "device-reset"], check=True, timeout=10)
    eventually(lambda: len(server.devices()) == 2, 30, "both devices")


def test_devices_in_mig_mode_are_not_published(
    driver: dra.Driver, node: dra.Kubelet, server: ApiServer, uuids: list[str]
) -> None:
    """The mode changes with a reset of the devices."""
    claim = server.claim("late", result(uuids[1], memory="1Gi"))
    subprocess.run([SIM / "fgpu-simd", "--fault", "mig,device-reset"], check=True, timeout=10)
    try:
        eventually(lambda: server.slice() is None, 30, "no slice")
        text = f"{uuids[1]}: the device is in MIG mode"
        eventually(lambda: "0 of 2 devices are offered" in driver.said() and text in driver.said(), 10, "the reasons")
        assert text in node.prepare(claim)[0].error
    finally:
        subprocess.run([SIM / "fgpu-simd", "--fault", "reset,device-reset"], check=True, timeout=10)
    eventually(lambda: len(server.devices()) == 2, 30, "both devices")


def test_only_named_devices_are_published(start: Start, server: ApiServer, uuids: list[str]) -> None:
    driver = start("--device", uuids[1][:12])
    eventually(lambda: [device["name"] for device in server.devices()] == [uuids[1].lower()], 30, "one device")
    assert f"1 of 2 devices are offered; {uuids[0]}: not named by --device" in driver.said()


def test_there_is_no_slice_and_no_preparation_without_an_agent(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, service: Service, uuids: list[str]
) -> None:
    claim = server.claim("early", result(uuids[0], memory="1Gi"))
    service.kill_agent()
    eventually(lambda: server.slice() is None, 30, "no slice")
    (answer,) = node.prepare(claim)
    assert answer.error.startswith("gpu.fgpu.dev: no agent answers")
    service.start_agent()
    eventually(lambda: len(server.devices()) == 2, 30, "the devices")
    assert ids(node.prepare(claim)[0])


# -- claims ------------------------------------------------------------------------------------------------------------


def test_a_pod_has_what_its_claim_consumes(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, pods: Pods, uuids: list[str], claims_dir: Path
) -> None:
    """The limit holds to the byte, and other devices refuse all memory. The end of the claim leaves no file."""
    claim = server.claim("one", result(uuids[1], memory="1537Mi", compute="25"))
    (answer,) = node.prepare(claim)
    uid = claim["metadata"]["uid"]
    (device,) = answer.devices
    assert ids(answer) == [[f"fgpu.dev/claim={uid}-0"]]
    assert (list(device.request_names), device.pool_name, device.device_name) == (["gpu"], NODE, uuids[1].lower())
    tenant = pods.pod(names=ids(answer)[0])
    client, limit = tenant.client(), 1537 * MIB
    client.ok("device 1")
    assert client.ok("info") == [limit - CONTEXT, limit]
    client.ok(f"alloc {(limit - CONTEXT) // (2 * MIB) * 2 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert tenant.client().do("device 0") == REFUSED
    assert tenant.run("printenv FGPU_SHARE NVIDIA_VISIBLE_DEVICES").split() == ["1537mib-25pct", uuids[1]]
    said = json.loads(fgpu("explain", tenant.path, "--json").stdout)
    assert [level["compute"][0]["limit_ratio"] for level in said["levels"]] == [0.25]
    assert [path.name for path in claims_dir.iterdir()] == [f"fgpu.dev-claim_{uid}.json"]
    assert node.unprepare(claim) == [""]
    assert not list(claims_dir.iterdir())


def test_the_status_of_a_claim_has_what_it_was_granted(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, uuids: list[str]
) -> None:
    """Devices of other drivers keep theirs."""
    allocated = [result(uuids[0], memory="1500000Ki", compute="30"), result(uuids[1])]
    claim = server.claim("one", *allocated)
    other = claim["status"]["devices"] = [{"driver": "other", "pool": "p", "device": "d"}]
    ids(node.prepare(claim)[0])
    eventually(lambda: len(claim["status"]["devices"]) == 3, 10, "the status")
    assert claim["status"]["devices"][:1] == other
    share, whole = claim["status"]["devices"][1:]
    (condition,) = share["conditions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", condition.pop("lastTransitionTime"))
    text = "each container of this claim gets at most 1464MiB and 30% of the device's time, or less under a policy"
    assert share == {
        "driver": dra.DRIVER, "pool": NODE, "device": uuids[0].lower(), "shareID": allocated[0]["shareID"],
        "conditions": [{"type": "Ready", "status": "True", "reason": "Prepared", "message": text}],
        "data": {"memory": "1464MiB", "compute": "30%"},
    }  # fmt: skip
    assert whole["device"] == uuids[1].lower()
    assert set(whole) == {"driver", "pool", "device", "conditions", "data"}
    assert set(whole["data"]) == {"memory"}


def test_a_status_is_written_once_the_api_server_accepts_it(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, uuids: list[str]
) -> None:
    claim = server.claim("one", result(uuids[0], memory="1Gi"))
    ids(node.prepare(claim)[0])
    server.refusing = (503, "overloaded")
    eventually(lambda: "PATCH" in server.refused, 10, "the first attempt")
    assert "devices" not in claim["status"]
    server.refusing = None
    eventually(lambda: claim["status"].get("devices"), 10, "the status")


def test_the_status_of_a_claim_that_has_been_replaced_is_not_written(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, uuids: list[str]
) -> None:
    first = server.claim("one", result(uuids[0], memory="1Gi"))
    ids(node.prepare(first)[0])
    second = server.claim("one", result(uuids[0], memory="2Gi"))
    eventually(lambda: "the status is not written: the API server answers 409" in driver.said(), 10, "the reason")
    assert "devices" not in first["status"]
    assert "devices" not in second["status"]


def test_a_claim_works_if_its_status_cannot_be_written(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, uuids: list[str]
) -> None:
    """The account of an older chart may not write it."""
    server.may_write_status = False
    claim = server.claim("one", result(uuids[0], memory="1Gi"))
    assert ids(node.prepare(claim)[0])
    eventually(lambda: "the status is not written: the API server answers 403" in driver.said(), 10, "the reason")
    assert "devices" not in claim["status"]


def test_a_pod_has_devices_that_cdi_knows(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, uuids: list[str], tmp_path: Path, claims_dir: Path
) -> None:
    (tmp_path / "cdi").mkdir()
    known = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu"}
    known |= {"devices": [{"name": uuid, "containerEdits": {}} for uuid in uuids]}
    (tmp_path / "cdi/nvidia.json").write_text(json.dumps(known))
    both = [result(uuid, f"request-{number}", memory="1Gi") for number, uuid in enumerate(uuids)]
    claim = server.claim("two", *both)
    (answer,) = node.prepare(claim)
    uid = claim["metadata"]["uid"]
    assert ids(answer) == [[f"nvidia.com/gpu={uuid}", f"fgpu.dev/claim={uid}-{n}"] for n, uuid in enumerate(uuids)]
    assert [list(device.request_names) for device in answer.devices] == [["request-0"], ["request-1"]]
    (path,) = claims_dir.iterdir()
    assert json.loads(path.read_text())["containerEdits"]["env"] == ["NVIDIA_VISIBLE_DEVICES=void"]


def test_a_repeated_preparation_changes_nothing_across_restarts(
    node: dra.Kubelet, start: Start, server: ApiServer, uuids: list[str], service: Service, claims_dir: Path
) -> None:
    """The driver is killed, the agent restarts, and kubelet asks again after its own restart."""
    claim = server.claim("one", result(uuids[0], memory="1Gi"))
    first = start()
    (answer,) = node.prepare(claim)
    (path,) = claims_dir.iterdir()
    before = path.stat().st_ino, path.read_text()
    first.kill()
    service.kill_agent()
    service.start_agent()
    node.stop()
    start()
    assert ids(node.prepare(claim)[0]) == ids(answer)
    assert ids(node.prepare(claim)[0]) == ids(answer)
    assert (path.stat().st_ino, path.read_text()) == before
    for _ in range(2):
        assert node.unprepare(claim) == [""]
    assert not list(claims_dir.iterdir())


def test_the_end_of_a_claim_needs_neither_agent_nor_api_server(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, uuids: list[str], service: Service, claims_dir: Path
) -> None:
    claims = [server.claim(name, result(uuids[0], memory="1Gi")) for name in ("a", "b")]
    assert all(map(ids, node.prepare(*claims)))
    server.stop()
    agent = ask(verb="ping")["pid"]
    os.kill(agent, signal.SIGSTOP)
    try:
        assert node.unprepare(*claims) == ["", ""]
    finally:
        os.kill(agent, signal.SIGCONT)
    assert not list(claims_dir.iterdir())
    (answer,) = node.prepare(claims[0])
    assert answer.error.startswith("gpu.fgpu.dev: the API server 127.0.0.1:")


def test_a_pod_may_have_any_number_of_claims(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, uuids: list[str], claims_dir: Path
) -> None:
    """kubelet prepares and unprepares all claims of a pod with one call."""
    claims = [server.claim(f"claim-{number}", result(uuids[0], memory="64Mi")) for number in range(100)]
    assert all(map(ids, node.prepare(*claims)))
    assert len(list(claims_dir.iterdir())) == 100
    assert node.unprepare(*claims) == [""] * 100
    assert not list(claims_dir.iterdir())


def test_a_wrong_claim_is_refused_with_a_sentence_and_others_are_prepared(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, uuids: list[str], claims_dir: Path
) -> None:
    good = server.claim("good", result(uuids[0], memory="1Gi"), result("x") | {"driver": "gpu.example.com"})
    wrong: dict[str, tuple[list[dict[str, Any]], str]] = {
        "missing": ([], 'the API server answers 404: "missing" not found'),
        "unallocated": ([], "the ResourceClaim has no allocated device of gpu.fgpu.dev"),
        "foreign": ([result("x") | {"driver": "gpu.example.com"}], "no allocated device of gpu.fgpu.dev"),
        "elsewhere": ([result(uuids[0], memory="1Gi") | {"pool": "other"}], "of the pool 'other', which is not this"),
        "unknown": ([result("gpu-7", memory="1Gi")], "this node has no device 'gpu-7'"),
        "small": ([result(uuids[0], memory="1Mi")], "consumes less than 2Mi of memory"),
        "without": ([result(uuids[0], compute="10")], "consumes no memory of"),
        "negative": ([result(uuids[0], memory="-1Gi")], "'-1Gi' is not a quantity"),
        "long": ([result(uuids[0], memory="9" * 5000)], "is not a quantity"),
        "admin": ([result(uuids[0], memory="1Gi") | {"adminAccess": True}], "requests admin access"),
        "broken": ([{"driver": dra.DRIVER}], "the ResourceClaim has an unknown form"),
    }
    claims = {name: server.claim(name, *results) for name, (results, _) in wrong.items()}
    replaced = server.claim("replaced", result(uuids[0], memory="1Gi"))
    server.claim("replaced", result(uuids[0], memory="8Gi"))
    outside = {"metadata": {"namespace": "default", "name": "../x", "uid": str(uuid.uuid4())}}
    odd = {"metadata": {"namespace": "default", "name": "good", "uid": "../../etc"}}
    server.objects.pop("/apis/resource.k8s.io/v1/namespaces/default/resourceclaims/missing")
    answers = node.prepare(*claims.values(), replaced, outside, odd, good)
    for (name, (_, text)), answer in zip(wrong.items(), answers, strict=False):
        assert text in answer.error, name
        assert len(answer.error) < 300
    assert "was replaced by another claim" in answers[-4].error
    assert "is not a ResourceClaim" in answers[-3].error
    assert "is not a ResourceClaim" in answers[-2].error
    assert len(ids(answers[-1])) == 1
    assert [path.name for path in claims_dir.iterdir()] == [f"fgpu.dev-claim_{good['metadata']['uid']}.json"]
    assert node.unprepare(*claims.values(), replaced, outside, odd, good) == [""] * (len(claims) + 4)


def test_what_a_claim_consumes_is_bounded_by_its_device(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, uuids: list[str], claims_dir: Path
) -> None:
    claim = server.claim("large", result(uuids[0], memory="99999999999999999999Ei", compute="9e99"))
    assert ids(node.prepare(claim)[0])
    (path,) = claims_dir.iterdir()
    whole = ask(verb="offers")["devices"][0]["capacity_bytes"] // MIB
    (device,) = json.loads(path.read_text())["devices"]
    assert device["containerEdits"]["env"] == [f"FGPU_SHARE={whole}mib-100pct"]


def test_a_share_that_does_not_fit_is_refused_when_its_container_starts(
    node: dra.Kubelet, driver: dra.Driver, server: ApiServer, pods: Pods, uuids: list[str]
) -> None:
    """The scheduler does not know of other tenants of the device."""
    whole = ask(verb="offers")["devices"][0]["capacity_bytes"] // GIB
    claims = [server.claim(name, result(uuids[0], memory=f"{whole}Gi")) for name in ("first", "second")]
    answers = node.prepare(*claims)
    pods.pod(names=ids(answers[0])[0])
    with pytest.raises(AssertionError) as caught:
        pods.pod(names=ids(answers[1])[0])
    assert "do not fit on device 0" in str(caught.value) or pods._runtime == "crun"
