"""The table of combinations in docs/faults.md: what a tenant with each feature gets during each fault.

Every fault affects tenants with all features at once. After each fault, the test checks the driver's bytes, the ledger,
a running program and a new program. The test needs a driver with two devices and its own agent, so it runs itself in a
separate mount namespace.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.combination_kit import Fault, World, assert_holds, inside
from tests.e2e.held_kit import LIMIT, Held, filled
from tests.support.commands import ask, fgpu
from tests.support.containers.docker import Docker
from tests.support.host import GPUS, RUN_DIR, fill
from tests.support.service import Service, run_on_devices
from tests.support.wait import eventually

# -- faults


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
    assert world.columns["by hand"].tenant.view()["source"] == "kept"
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
    eventually(lambda: not two.ledger(lost=1), 10, "the release of the program's memory on the other device")
    two.client.kill()
    eventually(lambda: two.client.pid not in two.tenant.pids(), 10, "the exit of the program")
    world.columns["two GPUs"] = filled(two.tenant)
    world.check()
    world.order("reset")
    eventually(lambda: len(ask(verb="snapshot")["devices"]) == 2, 20, "both devices")


def disk_full(folder: Path, world: World) -> None:
    filler = folder / "filler"
    fill(filler)
    world.restart()
    world.check()
    by_hand = world.columns["by hand"].tenant
    done = fgpu("set", by_hand.path, "--memory", f"{LIMIT}B", "--device", "0", check=False)
    assert bool(done.returncode) is (folder == RUN_DIR), done.stderr
    filler.unlink()


def stands_still(world: World) -> None:
    assert world.service.agent
    world.service.agent.send_signal(signal.SIGSTOP)
    time.sleep(world.scale(2, 5, 120))
    world.service.agent.send_signal(signal.SIGCONT)
    world.check()


OPEN = {"turns": "=; gates are open until the next gatekeeper runs"}
FAULTS = {
    "agent `kill -9`": Fault(agent_killed),
    "gatekeeper `kill -9`": Fault(gatekeeper_killed, OPEN),
    "agent and gatekeeper `kill -9`": Fault(both_killed, OPEN),
    "broken policy + restart": Fault(policy_broken),
    "missing folder + reload, + restart": Fault(folder_gone),
    "unreadable state files + restart": Fault(
        state_unreadable, {"by hand": "=; the agent reports the limit as `kept`"}
    ),
    "engine down + restart": Fault(engine_down, {"by label": "=; the agent uses the labels that the agent has stored"}),
    "NVML returns no data": Fault(
        nvml_blind,
        {"orphaned memory": "=; without data, the agent cannot establish that the memory was freed"},
    ),
    "`/run` full + restart": Fault(
        partial(disk_full, RUN_DIR), {"by hand": "=; `fgpu set` is refused until `/run` has space"}
    ),
    "`/var` full + restart": Fault(partial(disk_full, Path("/var/lib/fgpu"))),
    "the agent hangs (SIGSTOP)": Fault(
        stands_still, {"two GPUs": "=; the first use of a device waits for 2 s at most"}
    ),
    "one GPU lost + restart": Fault(
        gpu_lost,
        {
            "two GPUs": "a program that used the two GPUs has lost its memory; a new program of the tenant can have the"
            " whole limit on the other GPU"
        },
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(GPUS != "1", reason="this run has these devices already")
@pytest.mark.timeout(600)
def test_the_file_s_tests_pass_on_two_devices() -> None:
    run_on_devices(__file__, seconds=580)


class TestInside:
    """Tests that run in the namespace with two devices."""

    pytestmark = inside

    def test_tenants_behave_as_docs_faults_md_documents_during_each_fault(
        self, strict: Service, columns: dict[str, Held], fault: Callable[[str], None], scale: Callable[..., int]
    ) -> None:
        """The faults follow one another, so state that a fault leaves behind affects the next one."""
        assert_holds(World(strict, columns, fault, scale), FAULTS)
