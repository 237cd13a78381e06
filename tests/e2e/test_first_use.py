"""A limit counts on a device from the tenant's first use of that device.

A host can therefore have as many tenants as fit on each device. The test needs a driver with eight devices and its own
agent, so it runs itself in a separate mount namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, events, fgpu, metrics
from tests.support.host import CONTEXT, GIB, GPUS, MIB, REFUSED, cgroup_root
from tests.support.place import Cgroups
from tests.support.service import Service, run_on_devices
from tests.support.tenant import Client, Tenant
from tests.support.wait import Deadline, eventually

inside = pytest.mark.skipif(GPUS == "1", reason="is run by test_the_file_s_tests_pass_on_eight_devices")
DEVICES, LIMIT, FIT = 8, 8 * GIB, 9  # devices of 75 GiB, of which 74.7 are usable
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: first-use}}
spec:
  selector: {{cgroup: ["{group}/*"]}}
  memory: {{limit: 8GiB}}
"""


@pytest.mark.skipif(GPUS != "1", reason="this run has these devices already")
@pytest.mark.timeout(300)
def test_the_file_s_tests_pass_on_eight_devices() -> None:
    run_on_devices(__file__, DEVICES, "75GiB")


@pytest.fixture
def group(strict: Service, tmp_path: Path) -> Iterator[Cgroups]:
    """Return cgroups that a policy gives 8 GiB on each device."""
    place = Cgroups(tmp_path)
    file = strict.policies / "first-use.yaml"
    file.write_text(POLICY.format(group=place.group.lstrip("/")))
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 1, 5, "the policy")
    yield place
    place.close()
    file.unlink()
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy")


def committed() -> list[int]:
    return [device["committed_bytes"] for device in ask(verb="snapshot")["devices"]]


def use(place: Cgroups, device: int) -> Client:
    """Start a program of a new tenant with a context on this device."""
    client = place.tenant(None).client()
    client.ok(f"device {device}")
    return client


@inside
@pytest.mark.timeout(170)
def test_each_device_takes_as_many_tenants_as_fit_on_it(strict: Service, group: Cgroups) -> None:
    clients = [group.tenant(None).client() for _ in range(DEVICES * FIT)]
    assert clients[0].ok("info 0")[1] == LIMIT
    assert sum(committed()) == LIMIT, "only one tenant has used a device"
    for number, client in enumerate(clients):
        client.ok(f"device {number % DEVICES}")
        client.ok(f"alloc {10 * MIB}")
    assert committed() == [FIT * LIMIT] * DEVICES
    one = group.tenants[0].view()
    assert [seen["used_bytes"] for seen in one["devices"]] == [CONTEXT + 10 * MIB] + [0] * (DEVICES - 1)
    beyond = group.tenant(None).client()
    assert beyond.do("device 3") == REFUSED
    name = group.tenants[-1].name
    text = f"8GiB for {name} do not fit on device 3: 72GiB of 74.7GiB are committed to other tenants"
    eventually(lambda: any(text in event["text"] for event in events("no room")), 5, text)
    assert "on device 3" in fgpu("explain", group.tenants[-1].path).stdout
    strict.kill_agent()
    strict.start_agent()
    assert committed() == [FIT * LIMIT] * DEVICES
    assert beyond.do("device 3") == REFUSED
    leave(group, group.tenants[3])
    eventually(lambda: beyond.do("device 3").startswith("ok"), 20, "the room of the removed tenant")
    beyond.ok(f"alloc {10 * MIB}")
    assert committed() == [FIT * LIMIT] * DEVICES


def leave(group: Cgroups, tenant: Tenant) -> None:
    tenant.end()
    group.tenants.remove(tenant)


@inside
@pytest.mark.timeout(900)
def test_exactly_one_of_two_simultaneous_first_uses_gets_the_last_room(
    strict: Service, group: Cgroups, scale: Callable[..., int]
) -> None:
    for _ in range(FIT - 1):
        use(group, 7)
    for number in range(scale(5, 20, 1000)):
        pair = [group.tenant(None).client() for _ in range(2)]
        for client in pair:
            client.send("device 7")
        said = sorted(client.receive().split()[0] for client in pair)
        assert said == sorted(["ok", REFUSED]), number
        assert committed()[7] == FIT * LIMIT
        for tenant in group.tenants[-2:]:
            leave(group, tenant)
        eventually(lambda: committed()[7] == (FIT - 1) * LIMIT, 10, "the room of the winner")


@inside
def test_without_an_agent_a_used_device_stays_usable_and_an_unused_device_is_refused(
    strict: Service, group: Cgroups
) -> None:
    client = use(group, 0)
    strict.kill_agent()
    client.ok(f"alloc {MIB}")
    deadline = Deadline(5)
    assert client.do("device 1") == REFUSED
    assert not deadline.is_over()
    strict.start_agent()
    client.ok("device 1")
    assert committed()[:3] == [LIMIT, LIMIT, 0]


@inside
def test_a_group_counts_only_once_against_a_device(strict: Service, group: Cgroups) -> None:
    (cgroup_root() / group.group.lstrip("/")).mkdir(exist_ok=True)
    fgpu("set", group.group, "--memory", "70GiB")
    for _ in range(3):
        use(group, 2)
    assert committed() == [70 * GIB if device == 2 else 0 for device in range(DEVICES)]
    fgpu("unset", group.group)


def start_four(group: Cgroups) -> list[Client]:
    """Start programs in four new tenants, which have memory of device 0."""
    clients = [group.tenant(None).client() for _ in range(4)]
    for client in clients:
        client.ok("context")
    return clients


def answers(clients: list[Client], command: str) -> list[str]:
    """Send a command to all programs at one moment, and return their answers."""
    for client in clients:
        client.send(command)
    return [client.receive().split()[0] for client in clients]


@inside
@pytest.mark.timeout(900)
def test_a_new_limit_of_a_group_refuses_no_program_that_fits(
    strict: Service, group: Cgroups, scale: Callable[..., int]
) -> None:
    """The group gets a limit while its four programs use another device for the first time."""
    folder = cgroup_root() / group.group.lstrip("/")
    folder.mkdir(exist_ok=True)
    for number in range(scale(3, 8, 200)):
        clients = start_four(group)
        group.tenants[0].assert_enforced()
        ask(verb="put", target=group.group, memory="70GiB")
        assert answers(clients, "device 1") == ["ok"] * 4, number
        assert answers(start_four(group), "device 2") == ["ok"] * 4, number
        assert committed()[:4] == [70 * GIB] * 3 + [0]
        for tenant in list(group.tenants):
            leave(group, tenant)
        fgpu("unset", group.group)


@inside
def test_a_use_without_a_request_is_committed_once_the_agent_observes_it(strict: Service, group: Cgroups) -> None:
    one = group.tenant(None)
    client = Client(one, "outside", before="env LD_PRELOAD=")
    client.ok("device 5")
    client.ok(f"alloc {MIB}")
    eventually(lambda: committed()[5] == LIMIT, 5, "the commitment of the limit")
    assert sum(committed()) == LIMIT


@pytest.fixture
def named(group: Cgroups) -> Iterator[str]:
    """Yield the path of a cgroup without processes."""
    folder = cgroup_root() / group.group.lstrip("/") / "named"
    folder.mkdir(parents=True)
    yield f"{group.group}/named"
    folder.rmdir()


@inside
def test_a_limit_that_names_devices_is_committed_at_once(strict: Service, named: str) -> None:
    said = fgpu("set", named, "--memory", "60GiB", "--device", "6", "--device", "4").stdout
    assert "device 6, 4" in said
    assert committed() == [60 * GIB if device in (4, 6) else 0 for device in range(DEVICES)]
    lacking = fgpu("run", "--memory", "20GiB", "--device", "4", "--", "true", check=False)
    assert lacking.returncode == 125
    assert "do not fit on device 4: 60GiB of 74.7GiB" in lacking.stderr
    assert fgpu("run", "--memory", "20GiB", "--device", "5", "--", "true", check=False).returncode == 0
    assert fgpu("run", "--memory", "20GiB", "--", "true", check=False).returncode == 0, "refused without a named device"
    unknown = fgpu("run", "--memory", "20GiB", "--device", "8", "--", "true", check=False)
    assert unknown.returncode == 125
    assert "no device 8" in unknown.stderr
