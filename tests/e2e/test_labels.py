"""Labels of real Docker containers: which limits they select, the bounds of these limits, and an engine that stalls."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.labels_kit import HEAD, limit_of, write
from tests.support.commands import ask, fgpu, metrics
from tests.support.containers.docker import Docker
from tests.support.host import GIB, MIB, REFUSED, RUN_DIR, cgroup_root
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

BY_LABEL = f"""---
{HEAD}metadata: {{name: notebooks}}
spec:
  selector: {{cgroup: "docker/*", matchLabels: {{tier: notebook}}}}
  memory: {{limit: 3GiB, max: 6GiB}}
"""
POLICIES = f"""{BY_LABEL}---
{HEAD}metadata: {{name: others}}
spec:
  selector: {{cgroup: "docker/*"}}
  memory: {{limit: 1GiB, max: 2GiB}}
"""


@pytest.fixture(scope="module")
def engine(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """Run dockerd."""
    docker = Docker(tmp_path_factory.mktemp("docker"), service.engine)
    yield docker
    docker.close()


@pytest.fixture
def docker(service: Service, engine: Docker, unharmed: None) -> Iterator[Docker]:
    """Return dockerd with policies for its containers. Afterwards no container and no policy is left."""
    write(service, POLICIES)
    try:
        yield engine
    finally:
        engine.end_all()
        write(service, "")


def becomes(one: Tenant, policy: str, limit: int, seconds: float = 5) -> None:
    """Wait until the tenant has that limit, from the policy of that name."""
    eventually(lambda: limit_of(one) == (policy, limit), seconds, f"{policy} for {one.name}: {limit_of(one)}")
    one.assert_enforced()


def saved() -> str:
    """Return the agent's file of known labels."""
    file = RUN_DIR / "engines.json"
    return file.read_text() if file.exists() else ""


def full_by_label(docker: Docker, service: Service) -> tuple[Tenant, Client]:
    """Return a container at the limit of its label. Its engine has been stalled and the agent has been killed."""
    one = docker.container({"tier": "notebook"})
    eventually(lambda: [t for t in ask(verb="snapshot")["tenants"] if t["path"] == one.path], 5, "a tenant")
    becomes(one, "notebooks", 3 * GIB)
    client = one.client()
    client.ok(f"fill {2 * MIB} 0")
    eventually(lambda: os.path.basename(one.path) in saved(), 10, "its labels in the agent's file")
    docker.socket.stall()
    service.kill_agent()
    return one, client


def test_a_label_selects_the_policy_and_the_kernel_enforces_its_limit(docker: Docker) -> None:
    one, other = docker.container({"tier": "notebook"}), docker.container({"tier": "batch"})
    becomes(one, "notebooks", 3 * GIB)
    becomes(other, "others", GIB)
    for tenant, limit in ((one, 3 * GIB), (other, GIB)):
        client = tenant.client()
        assert client.ok("info")[1] == limit
        with tenant.growing():
            client.ok(f"fill {2 * MIB} 0")
        assert client.do(f"alloc {2 * MIB}") == REFUSED
        assert tenant.assert_exact() == limit
    assert "notebooks" in fgpu("explain", one.name).stdout  # by the name that Docker gives to the container


ASKED: list[tuple[dict[str, str], dict[str, str], int]] = [
    ({"fgpu.dev/memory": "5GiB"}, {}, 5 * GIB),
    ({"fgpu.dev/memory": "7GiB"}, {}, 6 * GIB),  # the policy's max
    ({"clearml-injector/fraction": "0.125"}, {}, 0),  # an eighth of the device's usable memory
    ({}, {"fgpu.dev/memory": "2GiB"}, 2 * GIB),  # the image's label lowers the limit
    ({}, {"fgpu.dev/memory": "5GiB"}, 3 * GIB),  # and never raises it
    ({"fgpu.dev/memory": "5GiB"}, {"fgpu.dev/memory": "4GiB"}, 5 * GIB),  # the container's label replaces the image's
]


def test_requests_of_containers_and_images_are_bounded_by_the_policy(docker: Docker) -> None:
    for labels, image, limit in ASKED:
        one = docker.container({"tier": "notebook", **labels}, image)
        usable = ask(verb="snapshot")["devices"][0]["capacity_bytes"]
        one.assert_enforced()
        if limit:
            becomes(one, "notebooks", limit)
        else:
            eventually(partial(is_an_eighth, one, usable), 5, "a limit of an eighth of the device")
        docker.end(one)


def test_labels_from_a_stalled_engine_change_the_limit_of_a_running_program_later(docker: Docker) -> None:
    docker.socket.stall()
    one = docker.container({"tier": "notebook"})
    eventually(lambda: limit_of(one) == ("others", GIB), 1, "the limit by cgroup")
    client = one.client()
    assert client.ok("info")[1] == GIB
    client.ok(f"fill {2 * MIB} 0")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    eventually(lambda: docker.socket.asked, 5, "a request to the engine")
    said = eventually(lambda: explained(one, "no answer within"), 10, "the reason of the missing labels in explain")
    assert "docker fails" in said
    eventually(lambda: "no answer within" in fgpu("doctor", check=False).stdout, 5, "doctor's finding")
    before = ages()
    time.sleep(1)
    assert ages() >= before  # the agent continues to work
    docker.socket.go_on()
    becomes(one, "notebooks", 3 * GIB, 10)
    assert client.ok("info")[1] == 3 * GIB
    client.ok(f"alloc {512 * MIB}")
    assert one.assert_exact() <= 3 * GIB
    assert up() == 1


def is_an_eighth(one: Tenant, usable: int) -> bool:
    return usable / 9 < limit_of(one)[1] <= usable / 8


def test_without_a_policy_by_cgroup_a_container_is_a_tenant_once_the_engine_answers(
    docker: Docker, service: Service
) -> None:
    write(service, BY_LABEL)
    docker.socket.stall()
    one = docker.container({"tier": "notebook"})
    client = one.client()
    assert client.ok("info")[1] > 15 * GIB
    client.ok(f"alloc {GIB}")
    docker.socket.go_on()
    eventually(lambda: any(t["path"] == one.path for t in ask(verb="snapshot")["tenants"]), 10, "a tenant")
    becomes(one, "notebooks", 3 * GIB)
    eventually(lambda: client.ok("info")[1] == 3 * GIB, 3, "the limit as the device's memory")
    eventually(lambda: one.memory()["used_bytes"] >= GIB, 3, "the charge of earlier memory by NVML's figures")
    client.ok(f"fill {2 * MIB} 0")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact() == 3 * GIB


def explained(one: Tenant, text: str) -> str:
    found = fgpu("explain", one.path).stdout
    return found if text in found else ""


def ages() -> float:
    return float(ask(verb="snapshot")["time_seconds"])


def up() -> float | None:
    return next((value for (name, _), value in metrics().items() if name == "fgpu_engine_up"), None)


def test_labels_apply_to_a_new_container_once_the_engine_can_be_reached_again(docker: Docker) -> None:
    one = docker.container({"tier": "notebook"})
    becomes(one, "notebooks", 3 * GIB)
    docker.socket.close()
    later = docker.container({"tier": "notebook"})
    eventually(lambda: limit_of(later) == ("others", GIB), 1, "the limit by cgroup")
    assert limit_of(one) == ("notebooks", 3 * GIB)  # a known label stays
    docker.open()
    becomes(later, "notebooks", 3 * GIB, 10)


def test_a_limit_by_label_survives_an_agent_restart_while_the_engine_is_down(docker: Docker, service: Service) -> None:
    write(service, BY_LABEL)
    one, client = full_by_label(docker, service)
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    service.start_agent()
    assert limit_of(one) == ("notebooks", 3 * GIB)
    for _ in range(20):
        assert client.do(f"alloc {2 * MIB}") == REFUSED
        time.sleep(0.05)
    assert one.assert_exact() == 3 * GIB


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_limit_by_label_survives_a_stop_of_the_agent_while_the_engine_is_down(
    docker: Docker, service: Service, scale: Callable[[int, int, int], int]
) -> None:
    """The agent is stopped, as in a frozen virtual machine, and the engine is down when the agent continues."""
    write(service, BY_LABEL)
    assert service.agent
    one = docker.container({"tier": "notebook"})
    eventually(lambda: [t for t in ask(verb="snapshot")["tenants"] if t["path"] == one.path], 5, "a tenant")
    becomes(one, "notebooks", 3 * GIB)
    client = one.client()
    client.ok(f"fill {2 * MIB} 0")
    docker.socket.stall()
    os.kill(service.agent.pid, signal.SIGSTOP)
    try:
        time.sleep(scale(0, 35, 125))  # a rescan is due every 30 s
    finally:
        os.kill(service.agent.pid, signal.SIGCONT)
    for _ in range(60):
        assert limit_of(one) == ("notebooks", 3 * GIB)
        assert client.do(f"alloc {2 * MIB}") == REFUSED
        time.sleep(0.05)
    assert one.assert_exact() == 3 * GIB


def add_a_key(file: Path) -> None:
    file.write_text(json.dumps([entry | {"colour": "blue"} for entry in json.loads(file.read_text())]))


@pytest.mark.parametrize(
    "damage", [add_a_key, Path.unlink, lambda file: file.write_text("[{")], ids=["later version", "gone", "garbage"]
)
def test_a_limit_by_label_survives_a_changed_missing_or_damaged_label_cache(
    docker: Docker, service: Service, damage: Callable[[Path], object]
) -> None:
    one, client = full_by_label(docker, service)
    damage(RUN_DIR / "engines.json")
    service.start_agent()
    assert one.memory()["limit_bytes"] == 3 * GIB, "the limit has changed"
    assert client.ok("info")[1] == 3 * GIB
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    docker.socket.go_on()
    becomes(one, "notebooks", 3 * GIB, 10)


def test_five_containers_get_their_limits_and_leave_no_tenant_or_cgroup(
    docker: Docker, record: Callable[[str], None]
) -> None:
    paths = []
    for _ in range(5):
        begun = time.monotonic()
        one = docker.container({"tier": "notebook"})
        becomes(one, "notebooks", 3 * GIB)
        record(f"limit by label in force {time.monotonic() - begun:.3f} s after the start")
        paths.append(cgroup_root() / one.path.lstrip("/"))
        assert paths[-1].is_dir()
        docker.end(one)
    eventually(lambda: not [t for t in ask(verb="snapshot")["tenants"] if t["path"].startswith("/docker/")], 5, "end")
    assert not [path for path in paths if path.exists()]


@pytest.fixture
def record(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Return a function that prints a measurement in spite of pytest's output capture."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(text)

    return say
