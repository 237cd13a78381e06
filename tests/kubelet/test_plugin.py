"""Tests of the data that kubelet receives: resources, ids, health. Kubelet and plugin may exit independently."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.support import commands
from tests.support.commands import fgpu, metrics
from tests.support.host import GIB, SIM
from tests.support.kubernetes import kubelet as kit
from tests.support.place import Cgroups, Place
from tests.support.service import Service
from tests.support.wait import Deadline, eventually

Start = Callable[..., kit.Plugin]
AWAY_SECONDS = 3.0  # slots are unhealthy 5 s after the agent's last answer, and the plugin asks every 2 s


def caps(pid: int) -> set[str]:
    """Return every capability set of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split()[1] for line in lines if line.startswith("Cap")}


def test_kubelet_gets_a_resource_for_each_profile(kubelet: kit.Kubelet, plugin: kit.Plugin, uuids: list[str]) -> None:
    two, one, four = (kubelet.resource(name) for name in ("2gib-25pct", "1gib", "4gib"))
    assert sorted((r.version, r.resource_name) for r in kubelet.registrations) == [
        ("v1beta1", f"fgpu.dev/{name}") for name in ("1gib", "2gib-25pct", "4gib")
    ]
    assert two.ids == [f"{uuid}::2gib-25pct::{number}" for uuid in uuids for number in range(2)]
    assert one.ids == [f"{uuid}::1gib::{number}" for uuid in uuids for number in range(3)]
    capacity = commands.ask(verb="offers")["devices"][1]["capacity_bytes"]
    rest = (capacity - 2 * 2 * GIB - 3 * GIB) // (4 * GIB)
    assert four.ids == [f"{uuids[1]}::4gib::{number}" for number in range(rest)], "as many as fit beside the others"
    for resource in (two, one, four):
        assert resource.healthy == resource.ids
        assert max(map(len, resource.ids)) <= 63
        assert resource.options.get_preferred_allocation_available
        assert not resource.options.pre_start_required
    nodes = {device.ID[:40]: [node.ID for node in device.topology.nodes] for device in two.lists[-1]}
    assert nodes == {uuid: [int(kit.NODES[index])] for index, uuid in enumerate(uuids)}
    assert caps(plugin.process.pid) == {"0" * 16}


def test_the_plugin_registers_again_after_a_restart_of_kubelet(kubelet: kit.Kubelet, plugin: kit.Plugin) -> None:
    before = kubelet.resource("1gib").ids
    for _ in range(2):
        kubelet.stop()
        kubelet.registrations.clear()
        kubelet.start()
        eventually(lambda: len(kubelet.registrations) == 3, 30, "three registrations")
        assert kubelet.resource("1gib").ids == before
        assert len(kubelet.registrations) == 3


def test_the_plugin_registers_again_after_a_closed_connection(kubelet: kit.Kubelet, plugin: kit.Plugin) -> None:
    """Kubelet does not restart. It closes its connection to the plugin's socket of one resource."""
    for name in ("1gib", "2gib-25pct", "4gib"):
        kubelet.resource(name)
    kubelet.resources.pop("fgpu.dev/1gib").close()
    assert kubelet.resource("1gib", 60).healthy
    assert [r.resource_name for r in kubelet.registrations[3:]] == ["fgpu.dev/1gib"], "others registered again too"


def test_a_plugin_that_started_before_kubelet_registers_when_kubelet_starts(kubelet: kit.Kubelet, start: Start) -> None:
    kubelet.stop()
    (kubelet.folder / "kubelet.sock").unlink(missing_ok=True)
    plugin = start()
    eventually(lambda: "the agent offers" in plugin.said(), 30, "the agent's offer in the plugin's log")
    kubelet.start()
    assert kubelet.resource("1gib").healthy


def test_the_plugin_waits_at_a_socket_without_a_listener(kubelet: kit.Kubelet, start: Start) -> None:
    """Kubelet has been killed, and its socket still exists. The socket of an earlier plugin exists as well."""
    kubelet.stop()
    (kubelet.folder / "kubelet.sock").unlink(missing_ok=True)
    for name in ("kubelet.sock", "fgpu.dev-1gib.sock"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(kubelet.folder / name))
    plugin = start()
    eventually(lambda: "unavailable" in plugin.said(), 30, "a registration that fails")
    kubelet.start()
    assert kubelet.resource("1gib").healthy


def test_a_refused_registration_is_repeated(kubelet: kit.Kubelet, start: Start) -> None:
    kubelet.refusing = "not today"
    plugin = start()
    eventually(
        lambda: "registration with kubelet failed: invalid_argument: not today" in plugin.said(), 30, "the refusal"
    )
    kubelet.refusing = ""
    assert kubelet.resource("1gib").healthy


def test_a_killed_plugin_registers_again_when_restarted(kubelet: kit.Kubelet, start: Start) -> None:
    first = start()
    before = kubelet.resource("2gib-25pct")
    first.kill()
    eventually(lambda: before.ended, 20, "the end of the stream")
    assert (kubelet.folder / "fgpu.dev-1gib.sock").exists(), "a killed plugin cannot remove its socket"
    start()
    after = eventually(lambda: (r := kubelet.resource("2gib-25pct")) is not before and r, 30, "another registration")
    assert after.ids == before.ids


def test_sigterm_ends_the_plugin_within_one_and_a_half_seconds(kubelet: kit.Kubelet, start: Start) -> None:
    """Streams are open at that time, and an allocation waits for an agent that is stopped."""
    plugin = start()
    resource = kubelet.resource("1gib")
    agent = commands.ask(verb="ping")["pid"]
    os.kill(agent, signal.SIGSTOP)
    try:
        asked = kubelet.api.AllocateRequest(
            container_requests=[kubelet.api.ContainerAllocateRequest(devices_ids=resource.ids[:1])]
        )
        pending = resource.plugin.Allocate.future(asked, timeout=30)
        time.sleep(0.2)  # the answer may arrive or be too late: both are right
        deadline = Deadline(1.5)
        plugin.stop()
        assert not deadline.is_over()
        assert pending.code() is not None
    finally:
        os.kill(agent, signal.SIGCONT)
    assert not list(kubelet.folder.glob("fgpu*"))


def test_a_stream_that_is_not_read_delays_no_other(kubelet: kit.Kubelet, plugin: kit.Plugin) -> None:
    """Many streams have a reader that sleeps. Other calls are served at that time."""
    resource = kubelet.resource("1gib")
    sleepers = [resource.plugin.ListAndWatch(kubelet.api.Empty()) for _ in range(50)]
    for name in ("1gib", "2gib-25pct"):
        found = kubelet.resource(name)
        assert found.preferred(1, found.ids) == found.ids[:1]
    for sleeper in sleepers:
        assert len(next(sleeper).devices) == len(resource.ids)
        sleeper.cancel()


def test_invalid_requests_are_refused(kubelet: kit.Kubelet, plugin: kit.Plugin, uuids: list[str]) -> None:
    one, two = kubelet.resource("1gib"), kubelet.resource("2gib-25pct")

    def refusal(ask: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            ask()
        return caught.value.code(), caught.value.details()

    wrong = grpc.StatusCode.INVALID_ARGUMENT
    for id_ in ("", "x", two.ids[0], one.ids[0] + "0", f"{uuids[0]}::1gib::-1", f"{uuids[0]}::1gib::{'9' * 5000}"):
        code, text = refusal(lambda id_=id_: one.allocate(id_))
        assert (code, "is not the id of a slot of fgpu.dev/1gib" in text) == (wrong, True), (id_, text)
        assert len(text) < 200
    code, text = refusal(lambda: one.allocate(*one.ids[:2]))
    assert (code, text) == (
        wrong,
        f"one container cannot have two shares of one device ({uuids[0]}): request a larger share",
    )
    raw = one.channel.unary_unary("/v1beta1.DevicePlugin/Allocate")
    assert refusal(lambda: raw(b"\xff" * 9, timeout=10)) == (wrong, "not a valid AllocateRequest")
    assert refusal(lambda: raw(b"\n" * (2 << 20), timeout=10))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    unknown = one.channel.unary_unary("/v1beta1.DevicePlugin/Deallocate")
    assert refusal(lambda: unknown(b"", timeout=10))[0] is grpc.StatusCode.UNIMPLEMENTED
    assert one.allocate(one.ids[0]).cdi_devices


# -- which ids -----------------------------------------------------------------------------------------------------


def test_the_plugin_prefers_slots_of_the_fuller_device(
    kubelet: kit.Kubelet, plugin: kit.Plugin, uuids: list[str]
) -> None:
    """Several ids of one request are on different devices."""
    one = kubelet.resource("1gib")
    first, second = [id_ for id_ in one.ids if id_.startswith(uuids[0])], [i for i in one.ids if i.startswith(uuids[1])]
    assert one.preferred(1, one.ids) == first[:1], "both devices are empty"
    assert one.preferred(2, one.ids) == [first[0], second[0]]
    assert one.preferred(2, one.ids, must=(second[2],)) == [second[2], first[0]]
    assert one.preferred(1, second) == second[:1]
    one.allocate(second[0])
    assert one.preferred(1, [*first, *second[1:]]) == second[1:2], "allocated room does not count as used"


# -- health --------------------------------------------------------------------------------------------------------


def test_no_id_is_healthy_without_an_agent(kubelet: kit.Kubelet, plugin: kit.Plugin, service: Service) -> None:
    one = kubelet.resource("1gib")
    service.kill_agent()
    eventually(lambda: not one.healthy, 30, "unhealthy")
    assert one.ids, "kubelet gets no list of the unhealthy ids"
    with pytest.raises(grpc.RpcError) as caught:
        one.allocate(one.ids[0])
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "no agent answers" in caught.value.details()
    service.start_agent()
    eventually(lambda: one.healthy == one.ids, 30, "healthy")
    assert kubelet.resource("1gib") is one, "the same registration"


def test_ids_are_unhealthy_while_nvml_does_not_answer(
    kubelet: kit.Kubelet, plugin: kit.Plugin, service: Service
) -> None:
    """The driver hangs."""
    one = kubelet.resource("1gib")
    simd = [SIM / "fgpu-simd", "--fault"]
    subprocess.run([*simd, "nvml-stall:120s"], check=True, timeout=10)
    try:
        eventually(lambda: not one.healthy, 60, "unhealthy")
        with pytest.raises(grpc.RpcError) as caught:
            one.allocate(one.ids[0])
        assert f"{one.ids[0][:40]}: NVML has not answered for " in caught.value.details()
    finally:
        subprocess.run([*simd, "reset"], check=True, timeout=10)
    eventually(lambda: one.healthy == one.ids, 60, "healthy")


def test_a_device_with_an_xid_is_unhealthy_until_its_reset(
    kubelet: kit.Kubelet, plugin: kit.Plugin, service: Service, uuids: list[str]
) -> None:
    """An XID that programs cause is only counted."""
    one, two = kubelet.resource("1gib"), kubelet.resource("2gib-25pct")
    order = lambda spec: subprocess.run([SIM / "fgpu-simd", "--fault", spec], check=True, timeout=10)  # noqa: E731

    def counted(cause: str) -> float:
        return metrics()["fgpu_device_xids_total", frozenset({("gpu", "1"), ("cause", cause)})]

    def healthy() -> list[float]:
        return [metrics()["fgpu_device_healthy", frozenset({("gpu", gpu)})] for gpu in "01"]

    def said(name: str) -> str:
        (line,) = [line for line in fgpu("doctor", check=False).stdout.splitlines() if f" {name}: " in line]
        return line

    before = {cause: counted(cause) for cause in ("program", "device")}
    order("xid=31:1,xid=13:1")
    eventually(lambda: counted("program") == before["program"] + 2, 20, "the two XIDs that programs cause")
    assert healthy() == [1, 1]
    assert (one.healthy, two.healthy) == (one.ids, two.ids)
    assert said("xids").startswith("ok ")
    order("xid=79:1")
    try:
        eventually(lambda: {id_[:40] for id_ in (*one.healthy, *two.healthy)} == {uuids[0]}, 20, "unhealthy")
        assert len(one.healthy) == 3, "the other device's ids changed"
        with pytest.raises(grpc.RpcError) as caught:
            one.allocate(one.ids[5])
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == f"{uuids[1]}: the device has reported XID 79"
        assert one.allocate(one.ids[0]).cdi_devices
        assert (healthy(), counted("device")) == ([1, 0], before["device"] + 1)
        assert said("xids") == "FAIL  xids: device 1 has reported XID 79"
        told = [event["text"] for event in commands.ask(verb="events")["events"] if event["what"] == "xid"]
        assert told[-1] == "79: no share of the device is offered"
        assert "healthy; the device has reported XID 79" in plugin.said()
    finally:
        order("device-reset")
    eventually(lambda: (one.healthy, two.healthy) == (one.ids, two.ids), 20, "healthy")
    assert healthy() == [1, 1]


@pytest.mark.timed
def test_an_agent_restart_changes_no_health(kubelet: kit.Kubelet, plugin: kit.Plugin, service: Service) -> None:
    one, told = kubelet.resource("1gib"), 0

    def restarts() -> bool:
        """Restart the agent. Return whether it was away for so short a time that its slots have to stay healthy."""
        nonlocal told
        eventually(lambda: one.healthy == one.ids, 30, "healthy")
        told, begun = len(one.lists), time.monotonic()
        service.kill_agent()
        service.start_agent()
        return time.monotonic() - begun < AWAY_SECONDS

    eventually(restarts, 30, f"a restart within {AWAY_SECONDS} s")
    assert one.allocate(one.ids[0]).cdi_devices
    assert all(device.health == "Healthy" for each in one.lists[told:] for device in each)


@pytest.fixture
def tenants(tmp_path: Path) -> Iterator[Place]:
    place = Cgroups(tmp_path)
    yield place
    place.close()


def test_room_that_other_tenants_use_is_no_longer_offered(
    kubelet: kit.Kubelet, plugin: kit.Plugin, tenants: Place, uuids: list[str]
) -> None:
    """A tenant outside of pods has all but 3 GiB of each device. It names the devices, so its limit counts at once."""
    two, one = kubelet.resource("2gib-25pct"), kubelet.resource("1gib")
    capacity = min(device["capacity_bytes"] for device in commands.ask(verb="offers")["devices"])
    tenant, memory = tenants.tenant(None), f"{capacity - 3 * GIB}B"
    fgpu("set", tenant.path, "--memory", memory, "--device", uuids[0], "--device", uuids[1])
    eventually(lambda: len(two.healthy) == 2, 30, "one of two on each")
    assert [id_[:40] for id_ in two.healthy] == uuids
    assert one.healthy == one.ids, "three of 1 GiB fit"
    two.allocate(two.healthy[0])
    eventually(lambda: len(one.healthy) == 4, 30, "1 GiB is left beside the promise")
    with pytest.raises(grpc.RpcError) as caught:
        two.allocate(two.ids[1])
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert f"2GiB do not fit on {uuids[0]}: 3GiB of" in caught.value.details()
    fgpu("unset", tenant.path)
    eventually(lambda: two.healthy == two.ids, 30, "room again")


# -- settings ------------------------------------------------------------------------------------------------------


def sizes(count: int) -> str:
    """Return profiles of 2 to 5 MiB, this many of each on each device."""
    return "[" + ", ".join(f"{{share: {size}mib, count: {count}}}" for size in range(2, 6)) + "]"


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        (sizes(124), ""),
        (
            sizes(125),
            "fgpu: 1000 slots are too many for kubelet (fewer than 1000 are allowed): "
            "reduce the counts of profiles in agent.yaml",
        ),
        ("[{share: 10gib, count: 2}]", "fgpu.kubelet: profiles: 2 of 10gib would take 20GiB of "),
        ("[]", "fgpu.kubelet: the agent offers nothing: list profiles in agent.yaml, and restart the agent"),
    ],
)
def test_the_plugin_offers_992_slots_and_reports_profiles_that_cannot_be_offered(
    kubelet: kit.Kubelet, start: Start, service: Service, profiles: str, said: str
) -> None:
    before = service.config.read_text()
    service.config.write_text(before.replace(kit.PROFILES, profiles))
    service.kill_agent()
    service.start_agent()
    try:
        plugin = start()
        if not said:
            found = [kubelet.resource(f"{size}mib") for size in range(2, 6)]
            assert [len(resource.healthy) for resource in found] == [248] * 4
            answer = kubelet.api.ListAndWatchResponse(devices=found[0].lists[-1])
            assert answer.ByteSize() * 4 < 4 << 20
            return
        eventually(lambda: said in plugin.said(), 30, said)
        assert not kubelet.registrations
        if said.startswith("fgpu: "):
            assert plugin.process.wait(20) == 1
            assert plugin.said().splitlines()[-1] == said
    finally:
        service.config.write_text(before)
        service.kill_agent()
        service.start_agent()


def test_doctor_reports_whether_the_plugin_is_registered(kubelet: kit.Kubelet, start: Start) -> None:
    assert "FAIL  device plugin: no device plugin offers 2gib-25pct, 1gib, 4gib" in kit.doctor(kubelet.folder)
    start()
    for name in ("2gib-25pct", "1gib", "4gib"):
        kubelet.resource(name)
    assert "ok    device plugin: fgpu.dev/2gib-25pct: 4, fgpu.dev/1gib: 6, fgpu.dev/4gib: " in kit.doctor(
        kubelet.folder
    )
