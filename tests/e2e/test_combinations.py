"""The table of combinations in docs/architecture.md: what a tenant has under each feature, through each fault.

Every fault meets tenants under all features at once: for each the driver's bytes, the ledger and a program that runs
are looked at, and one that starts. Needs a driver with two devices and an agent of its own, and so runs itself in a
mount namespace of its own.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from docker_kit import DOCKERD, Docker
from harness import (
    GPUS,
    MIB,
    REFUSED,
    ROOT,
    RUN_DIR,
    Cgroups,
    Service,
    Tenant,
    ask,
    eventually,
    fgpu,
    fill,
    metrics,
    run_on_devices,
)
from held_kit import LIMIT, Held, filled

inside = [
    pytest.mark.skipif(GPUS == "1", reason="is run by test_on_two_devices"),
    pytest.mark.skipif(not DOCKERD, reason="no dockerd: ./dev test unpacks it"),
    pytest.mark.timeout(900),
]
HEAD = "apiVersion: fgpu.dev/v1alpha1\nkind: GpuPolicy\n"
POLICIES = {
    "turns": "memory: {limit: 558MiB}, compute: {weight: 100}",
    "two": "memory: {limit: 558MiB}",
    "denied": "memory: {limit: 15GiB}",
    "observe": "mode: observe, memory: {limit: 558MiB}",
    "outer": "memory: {limit: 600MiB}",
    "outer/inner": "memory: {limit: 558MiB}",
    "orphaned": "memory: {limit: 558MiB}",
}
LABELS = 'selector: {cgroup: "docker/*", matchLabels: {tier: small}}, memory: {limit: 558MiB}'


class Timed(Held):
    """It has a share of the device's time too."""

    def check(self, lost: int = -1) -> None:
        """And keeps it."""
        super().check(lost)
        assert self.tenant.memory()["compute"]


class Denied(Held):
    """Its limit does not fit beside the others: it gets nothing."""

    def check(self, lost: int = -1) -> None:
        """And so does a program that starts."""
        assert self.client.do("device 0") == REFUSED
        assert self.tenant.driver() == 0
        eventually(lambda: re.search("do not fit on device 0|was no room", self.tenant.view()["denied"]), 5, "why")


class Observed(Held):
    """Nothing is refused, all is counted."""

    def check(self, lost: int = -1) -> None:
        """Beyond its limit too, and in a program that starts."""
        self.client.ok("device 0")
        (at,) = self.client.ok(f"alloc {64 * MIB}")
        eventually(lambda: self.ledger(lost)[0] == self.tenant.driver_by_device()[0] > LIMIT, 10, "the ledger")
        self.client.ok(f"free {at}")
        eventually(lambda: self.ledger(lost) == {0: self.bytes[0]}, 10, "the ledger")


class Orphaned(Held):
    """A child has the descriptors of a process that has ended, so the driver keeps its memory: it stays charged."""

    def check(self, lost: int = -1) -> None:
        """To the tenant of that process, as orphaned."""
        memory = self.tenant.memory
        eventually(lambda: memory()["used_bytes"] == memory()["orphaned_bytes"] == LIMIT, 10, "its memory")
        assert self.client.do("context") == REFUSED


@pytest.fixture
def places(strict: Service, tmp_path: Path) -> Iterator[tuple[Cgroups, Docker]]:
    """Where the tenants are; policies match their cgroups and labels."""
    (tmp_path / "docker").mkdir()
    group, docker = Cgroups(tmp_path), Docker(tmp_path / "docker", strict.engine)
    texts = [f'selector: {{cgroup: "{group.group.lstrip("/")}/{path}"}}, {rest}' for path, rest in POLICIES.items()]
    files = [f"---\n{HEAD}metadata: {{name: p{n}}}\nspec: {{{text}}}\n" for n, text in enumerate([*texts, LABELS])]
    file = strict.policies / "mix.yaml"
    file.write_text("".join(files))
    try:
        eventually(lambda: metrics()["fgpu_policies", frozenset()] == len(files), 5, "the policies")
        yield group, docker
    finally:
        docker.close()
        for pid in (pid for tenant in group.tenants if tenant.name == "orphaned" for pid in tenant.pids()):
            os.kill(pid, signal.SIGKILL)
        group.close()
        file.unlink()


@pytest.fixture
def columns(places: tuple[Cgroups, Docker]) -> dict[str, Held]:
    """By feature, as the table names it."""
    group, docker = places
    made = {path: at(group, path) for path in POLICIES if path != "outer"}
    hand = at(group, "hand")
    fgpu("set", hand.path, "--memory", f"{LIMIT}B", "--device", "0")
    return {
        "turns": filled(made["turns"], kind=Timed),
        "two GPUs": filled(made["two"], (0, 1)),
        "two levels": filled(made["outer/inner"]),
        "observe": filled(made["observe"], kind=Observed),
        "by hand": filled(hand),
        "by label": filled(docker.container({"tier": "small"})),
        "orphaned memory": orphaned(made["orphaned"]),
        "overcommit: forbid": Denied(made["denied"], made["denied"].client()),
    }


def at(group: Cgroups, path: str) -> Tenant:
    """A tenant that a policy matches by its cgroup's path, but for `hand`."""
    tenant = group.named(path)
    if path not in ("hand", "observe"):
        tenant.assert_enforced()
    return tenant


def orphaned(tenant: Tenant) -> Held:
    """A program of the tenant has ended, and its child has not."""
    column, other = filled(tenant), tenant.client()
    column.client.ok("linger")
    column.client.kill()
    column.client.close()
    return Orphaned(tenant, other)


# -- faults


@dataclass
class World:
    """What a fault is made with."""

    service: Service
    columns: dict[str, Held]
    order: Callable[[str], None]
    scale: Callable[..., int]
    lost: int = -1  # a device, and with it what was on it

    def restart(self, how: int = signal.SIGKILL) -> None:
        """The agent ends, and another starts."""
        self.service.kill_agent(how)
        self.service.start_agent()

    def check(self) -> None:
        """Every column."""
        for name, column in self.columns.items():
            try:
                column.check(self.lost)
            except AssertionError as error:
                raise AssertionError(f"column {name}") from error


def agent_killed(world: World) -> None:
    world.restart()
    world.check()


def gatekeeper_killed(world: World) -> None:
    world.service.kill_gatekeeper()
    eventually(world.service.gatekeepers, 3, "another gatekeeper")
    world.check()


def both_killed(world: World) -> None:
    world.service.kill_agent()
    world.service.kill_gatekeeper()
    world.service.start_agent()
    world.check()


def policy_broken(world: World) -> None:
    file = world.service.policies / "zz.yaml"
    file.write_text("x: [")
    world.restart(signal.SIGTERM)
    world.check()
    file.unlink()
    eventually(lambda: not fgpu("reload", check=False).returncode, 5, "good policies")


def folder_gone(world: World) -> None:
    folder = world.service.policies
    aside = folder.with_name("aside")
    folder.rename(aside)
    assert fgpu("reload", check=False).returncode == 1
    world.check()
    world.restart()
    world.check()
    aside.rename(folder)
    eventually(lambda: not fgpu("reload", check=False).returncode, 5, "good policies")


def state_unreadable(world: World) -> None:
    kept = {name: (RUN_DIR / name).read_bytes() for name in ("overrides.json", "engines.json", "tenants.json")}
    world.service.kill_agent()
    for name in kept:
        (RUN_DIR / name).write_bytes(b"{")
    world.service.start_agent()
    world.check()
    world.service.kill_agent()
    for name, text in kept.items():
        (RUN_DIR / name).write_bytes(text)
    world.service.start_agent()


def engine_down(world: World) -> None:
    docker = world.columns["by label"].tenant.place
    assert isinstance(docker, Docker)
    docker.socket.stall()
    world.restart()
    world.check()
    docker.socket.go_on()


def nvml_blind(world: World) -> None:
    world.order("nvml-gone")
    time.sleep(2)
    world.check()
    world.order("reset")


def gpu_lost(world: World) -> None:
    two = world.columns.pop("two GPUs")
    world.order("device-lost:1")
    world.lost = 1
    world.restart()
    world.check()
    eventually(lambda: not two.ledger(lost=1), 10, "what the program had on the other device")
    two.client.kill()
    world.columns["two GPUs"] = filled(two.tenant)
    world.check()
    world.order("reset")
    eventually(lambda: len(ask(verb="snapshot")["devices"]) == 2, 20, "both devices")


def run_full(world: World) -> None:
    filler = RUN_DIR / "filler"
    fill(filler)
    world.restart()
    world.check()
    filler.unlink()


def stands_still(world: World) -> None:
    assert world.service.agent
    world.service.agent.send_signal(signal.SIGSTOP)
    time.sleep(world.scale(2, 5, 120))
    world.service.agent.send_signal(signal.SIGCONT)
    world.check()


FAULTS = {
    "agent `kill -9`": agent_killed,
    "gatekeeper `kill -9`": gatekeeper_killed,
    "both": both_killed,
    "broken policy + restart": policy_broken,
    "missing folder + reload, + restart": folder_gone,
    "unreadable state files + restart": state_unreadable,
    "engine down + restart": engine_down,
    "NVML blind": nvml_blind,
    "`/run` full + restart": run_full,
    "the agent stands still": stands_still,
    "one GPU lost + restart": gpu_lost,
}


@pytest.mark.slow
@pytest.mark.skipif(GPUS != "1", reason="this is it")
@pytest.mark.timeout(600)
def test_on_two_devices() -> None:
    run_on_devices(__file__, seconds=580)


class TestInside:
    """Where there are two devices."""

    pytestmark = inside

    def test_the_table_holds(
        self, strict: Service, columns: dict[str, Held], fault: Callable[[str], None], scale: Callable[..., int]
    ) -> None:
        """One fault after the other: what one leaves behind, the next one meets."""
        world = World(strict, columns, fault, scale)
        world.check()
        for name, make in FAULTS.items():
            try:
                make(world)
                world.check()
            except AssertionError as error:
                raise AssertionError(f"row {name}") from error
            print(f"{name}: holds")


def test_the_page_has_this_table() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    table = text[text.index("## What holds through which fault") :]
    rows = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)
    assert set(FAULTS) <= set(rows), set(FAULTS) - set(rows)
