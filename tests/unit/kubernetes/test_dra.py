"""Quantities of claims, the devices of a slice, and the files of prepared claims."""

from __future__ import annotations

import asyncio
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from fgpu_ebpf import control_client
from fgpu_ebpf.containers.cdi import Parts
from fgpu_ebpf.kubernetes import claims, dra_driver, dra_messages, resource_slices
from fgpu_ebpf.kubernetes.claim_files import ClaimFiles
from fgpu_ebpf.kubernetes.claims import ClaimError
from fgpu_ebpf.kubernetes.device_plugin_server import Endpoint
from fgpu_ebpf.kubernetes.dra_server import DraServer
from fgpu_ebpf.kubernetes.slots import Device, Host
from fgpu_ebpf.policy import share_name
from fgpu_ebpf.policy.device_choice import device_choice

UUID = "GPU-4f1d0a52-6c3b-4b0e-9d57-2f0c5a3b7e11"
UID = "0b8f5b1e-9a64-4b44-8a2b-6c1f0f3d2a10"
GIB, MIB = 1 << 30, 1 << 20
FACTS = {"driver": "580.65.06", "models": {UUID: "NVIDIA H200"}, "overcommit": False}


def parts(folder: Path, version: str) -> Parts:
    return Parts(folder / f"shim-{version}", folder / "socket", folder / "preload", folder / "fgpu-oci", folder)


def host(capacity_bytes: int, fault: str = "", of_device: str = "") -> Host:
    return Host(fault, {UUID: Device(UUID, 0, None, of_device, capacity_bytes, capacity_bytes, {})})


def shares(capacity_bytes: int, **consumed: Any) -> list[str]:
    """Return the shares of a claim that consumes this of the device."""
    result = {"driver": claims.DRIVER, "pool": "n", "device": UUID.lower(), "request": "gpu"}
    result |= {"consumedCapacity": consumed} if consumed else {}
    claim = {"metadata": {"uid": UID}, "status": {"allocation": {"devices": {"results": [result]}}}}
    return [grant.share.name for grant in claims.grants(claim, UID, "n", host(capacity_bytes))]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("8Gi", 8 * GIB), ("1.5Ki", 1536), ("100M", 100_000_000), ("2k", 2000), ("1500m", Fraction(3, 2)),
        ("1E", 10**18), ("1Ei", 1 << 60), ("2e3", 2000), ("1E3", 1000), ("500n", Fraction(1, 2_000_000)),
    ],
)  # fmt: skip
def test_a_quantity_has_kubernetes_s_units(text: str, value: Fraction) -> None:
    assert claims.quantity(text) == value


@pytest.mark.parametrize(
    "text", ["", "Gi", "-1", "+1", "1 Gi", "1GiB", "1g", "0x10", "1e", "1e100", "inf", "1" * 21, "\uff11"]
)
def test_other_texts_are_not_quantities(text: str) -> None:
    with pytest.raises(ClaimError, match="is not a quantity"):
        claims.quantity(text)


@pytest.mark.parametrize(
    ("consumed", "share"),
    [
        ({"memory": "8Gi", "compute": "30"}, "8192mib-30pct"),
        ({"memory": "8Gi", "compute": "0"}, "8192mib"),
        ({"memory": "8Gi"}, "8192mib"),
        ({"memory": "2Mi", "compute": "1"}, "2mib-1pct"),
        ({"memory": "3500k", "compute": "1500m"}, "3mib-1pct"),
        ({"memory": "99Ti", "compute": "1000"}, "16000mib-100pct"),
        ({}, "16000mib"),
    ],
)
def test_a_claim_becomes_a_share_within_its_device(consumed: dict[str, str], share: str) -> None:
    assert shares(16000 * MIB + 1, **consumed) == [share]


@pytest.mark.parametrize("metadata", [{}, None, {"uid": None}, []])
def test_a_claim_of_unknown_form_is_refused(metadata: Any) -> None:
    with pytest.raises(ClaimError):
        claims.grants({"metadata": metadata}, UID, "n", host(GIB))


def test_a_slice_has_only_devices_of_which_shares_may_be_given() -> None:
    (device,) = resource_slices.devices(host(16 * GIB), FACTS)
    assert device["name"] == UUID.lower()
    assert device["capacity"]["memory"]["value"] == "16Gi"
    assert device["attributes"]["model"] == {"string": "NVIDIA H200"}
    (odd,) = resource_slices.devices(host(16 * GIB - 1), FACTS)
    assert odd["capacity"]["memory"]["value"] == "16383Mi"
    for none in (host(GIB, fault="no limit"), host(GIB, of_device="lost"), host(63 * MIB)):
        assert resource_slices.devices(none, FACTS) == []


def test_a_device_that_is_not_named_or_may_not_be_given_is_left_out_with_a_reason() -> None:
    found, other = host(16 * GIB), UUID.replace("4f1d", "5f1d")
    found = Host("", {**found.devices, other: Device(other, 1, None, "the device is in MIG mode", GIB, GIB, {})})
    facts = FACTS | {"models": {UUID: "NVIDIA H200", other: "NVIDIA A30"}}
    for texts, names in (
        ((), [UUID]),
        (("0",), [UUID]),
        (("gpu-4f1d",), [UUID]),
        (("H200", "*A30"), [UUID]),
        (("1",), []),
        (("L4",), []),
    ):
        choices = [device_choice(text) for text in texts]
        published = [device["name"] for device in resource_slices.devices(found, facts, choices)]
        assert published == [name.lower() for name in names], texts
        assert {UUID, other} - set(resource_slices.left_out(found, facts, choices)) == set(names)
    assert resource_slices.left_out(found, facts) == {other: "the device is in MIG mode"}
    assert resource_slices.left_out(found, facts, [device_choice(0)]) == {other: "not named by --device"}


def round_up_range(requested: int, least: int, step: int) -> int:
    """Return what the scheduler consumes for a request (roundUpRange in consumable_capacity.go of Kubernetes 1.36)."""
    rounded = least + -(-(requested - least) // step) * step
    return (rounded + (1 << 63)) % (1 << 64) - (1 << 63)


@pytest.mark.parametrize("requested", [(1 << 63) - 1, 1 << 62, 8 * GIB + 1, 64 * MIB])  # 8Ei is read as 2^63 - 1
def test_no_request_overflows_in_the_scheduler(requested: int) -> None:
    (device,) = resource_slices.devices(host(16 * GIB), FACTS)
    for capacity in device["capacity"].values():
        of = {key: int(claims.quantity(text)) for key, text in capacity["requestPolicy"]["validRange"].items()}
        assert round_up_range(requested, of["min"], of["step"]) >= requested


@pytest.mark.parametrize("quantity", [str(-(1 << 63)), "-1", "1Gi ", "", "8GiB", None, {}, []])
def test_an_odd_quantity_is_refused_with_a_text(quantity: Any) -> None:
    for name in ("memory", "compute"):
        with pytest.raises(ClaimError, match="is not a quantity of 0 or more, such as 8Gi or 30"):
            shares(GIB, **{"memory": "64Mi", name: quantity})


def test_another_version_of_the_agent_renews_the_files_of_claims(tmp_path: Path) -> None:
    """A container of a running pod may start again, and the earlier shim may be gone then."""
    files, share = ClaimFiles(tmp_path), share_name.parse(f"1gib-25pct:{UUID}")
    names = files.prepare(UID, [share], {"A": "b"}, parts(tmp_path, "1"))
    assert names == [f"fgpu.dev/claim={UID}-0"]
    (tmp_path / f"fgpu.dev-claim_{UID.replace('0', '1')}.json").write_text("{")
    before = json.loads(files.place(UID).read_text())
    files.renew(parts(tmp_path, "2"))
    after = json.loads(files.place(UID).read_text())
    assert json.loads(json.dumps(before).replace("shim-1", "shim-2")) == after
    assert before != after
    files.unprepare(UID)
    files.unprepare(UID)
    assert not files.place(UID).exists()


def test_a_request_may_have_any_number_of_claims(tmp_path: Path) -> None:
    """Otherwise a pod with many claims would stay Terminating for ever."""
    messages = dra_messages.classes()
    busy = most = 0

    async def answer(_: Any) -> Any:
        nonlocal busy, most
        busy, most = busy + 1, max(most, busy + 1)
        await asyncio.sleep(0)
        busy -= 1
        return messages["NodeUnprepareResourceResponse"]()

    claims = [{"namespace": "n", "name": f"c-{number}", "uid": f"u-{number}"} for number in range(1000)]
    request = messages["NodeUnprepareResourcesRequest"](claims=claims).SerializeToString()
    server = DraServer(tmp_path, messages, answer, answer)
    found = messages["NodeUnprepareResourcesResponse"].FromString(asyncio.run(server._unprepare_all(request, None)))
    assert [one.key for one in found.claims] == [claim["uid"] for claim in claims]
    assert most <= 16


def offers(fault: str) -> dict[str, Any]:
    """Return an agent's answer to `offers`."""
    return {"fault": fault, "devices": [], "mounts": [], "facts": FACTS | {"parts": ["/"] * len(Parts._fields)}}


def test_preparations_at_the_same_time_share_one_request_to_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later preparation sends another request, because the agent may have stopped enforcing."""
    requests = 0

    async def ask(*_: Any) -> dict[str, Any]:
        nonlocal requests
        requests += 1
        await asyncio.sleep(0)
        return offers("")

    monkeypatch.setattr(control_client, "ask", ask)

    async def run() -> None:
        driver = dra_driver._Driver(dra_driver.Options("n", tmp_path), Any, {})
        found = await asyncio.gather(*(driver._agent() for _ in range(10)))
        assert (len(found), requests) == (10, 1)
        await driver._agent()
        assert requests == 2

    asyncio.run(run())


def test_no_claim_waits_for_statuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API server answers reads, and no write."""
    monkeypatch.setattr(dra_driver, "STATUS_SECONDS", (0.0,))
    written = 0

    class Api:
        async def call(self, method: str, *_: Any) -> dict[str, Any]:
            nonlocal written
            if method == "PATCH":
                written += 1
                await asyncio.Event().wait()
            return {"method": method}

    async def run() -> None:
        driver = dra_driver._Driver(dra_driver.Options("n", tmp_path), Api(), {})  # type: ignore[arg-type]
        for number in range(3 * dra_driver.MOST_REQUESTS):
            driver._report(f"/claims/{number}", {})
        async with asyncio.timeout(20):
            while not written:
                await asyncio.sleep(0.01)
            assert await driver._call(driver._reads, "GET", "/claims/late") == {"method": "GET"}

    asyncio.run(run())


class FakeServer:
    """A stand-in for a server of grpc.aio, of which the threads would stay in the process of all later tests."""

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        pass

    def add_insecure_port(self, address: str) -> None:
        Path(address.removeprefix("unix:")).touch()

    async def start(self) -> None:
        pass

    async def stop(self, seconds: float) -> None:
        pass


@pytest.fixture
def fake_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MagicMock()
    made.aio.server = lambda options: FakeServer()
    monkeypatch.setitem(sys.modules, "grpc", made)
    monkeypatch.setitem(sys.modules, "grpc.aio", made.aio)


@pytest.mark.usefixtures("fake_grpc")
@pytest.mark.parametrize("blocked", ["plugins_registry", "plugins"])
def test_a_server_that_could_not_be_opened_is_opened_when_it_can_be(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).write_text("")

    async def answer(_: Any) -> Any:
        raise NotImplementedError

    async def run() -> None:
        server = DraServer(tmp_path, dra_messages.classes(), answer, answer)
        for _ in range(3):
            with pytest.raises(OSError, match=blocked):
                await server.open()
            assert not server.is_open
        (tmp_path / blocked).unlink()
        await server.open()
        assert server.is_open
        await server.close()
        assert not server.path.exists()

    asyncio.run(run())


@pytest.mark.usefixtures("fake_grpc")
def test_an_endpoint_that_could_not_be_opened_is_opened_when_it_can_be(tmp_path: Path) -> None:
    async def run() -> None:
        endpoint = Endpoint(MagicMock(folder=tmp_path / "kubelet"), "8gib")
        with pytest.raises(OSError, match="kubelet"):
            await endpoint.open()
        assert not endpoint.is_open
        (tmp_path / "kubelet").mkdir()
        await endpoint.open()
        assert endpoint.is_open
        await endpoint.close()
        assert not endpoint.path.exists()

    asyncio.run(run())
