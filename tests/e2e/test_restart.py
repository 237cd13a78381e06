"""Agent and gatekeeper are killed and restarted. Limits stay, no program is affected, and the ledger stays exact."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.load_kit import load
from tests.support.commands import fgpu
from tests.support.host import (
    CONTEXT,
    ENVIRONMENT,
    FGPU,
    GIB,
    MIB,
    REFUSED,
    ROOT,
    RUN_DIR,
    SERVICE_ENVIRONMENT,
    cgroup_root,
)
from tests.support.service import Service
from tests.support.wait import Deadline, eventually, quiet_seconds

ROOM = 40 * MIB


@pytest.fixture
def agent(service: Service, unharmed: None) -> Iterator[Service]:
    """Return the service, and start its agent again if a test has ended the agent."""
    yield service
    if service.agent is None or service.agent.poll() is not None:
        service.start_agent()


def restart(service: Service, number: int) -> None:
    """Kill agent, gatekeeper or both, in turn, and start them again."""
    if number % 3 == 0:
        service.kill_gatekeeper()
        eventually(service.gatekeepers, 3, "another gatekeeper")
        return
    service.kill_agent()
    if number % 3 == 1:
        service.kill_gatekeeper()
    service.start_agent()


@pytest.mark.places("runc")
def test_agent_and_gatekeeper_have_a_nice_value_of_minus_10(agent: Service) -> None:
    """Programs wait for these processes when they start, also while many other programs start."""
    assert agent.agent
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in (agent.agent.pid, *agent.gatekeepers())} == {-10}


@pytest.mark.places("runc")  # test_failpoints.py has the same test on the host
def test_restarts_do_not_affect_running_programs(agent: Service, tenant, scale) -> None:
    tenants = [tenant(2 * CONTEXT + ROOM) for _ in range(2)]
    for one in tenants:
        one.assert_enforced()
    stops = [load(one)[1] for one in tenants]
    for number in range(scale(3, 3, 20)):
        restart(agent, number + 1)
        for one in tenants:
            one.assert_enforced()
            memory = one.memory()
            assert memory["used_bytes"] <= memory["peak_bytes"] <= memory["limit_bytes"] == 2 * CONTEXT + ROOM
    for stop in stops:
        stop()
    for one in tenants:
        assert one.assert_exact() == 2 * CONTEXT
        memory = one.memory()
        assert memory["admitted_bytes"] == memory["witnessed_bytes"]


@pytest.mark.places("host", "runc")
def test_limits_hold_without_agent_and_gatekeeper(agent: Service, tenant) -> None:
    one = tenant(CONTEXT + ROOM)
    client = one.client()
    client.ok("context")
    with one.growing(ROOM):
        client.ok(f"fill {2 * MIB} 0")
        client.do("info")
    agent.kill_agent()
    agent.kill_gatekeeper()
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert client.ok("info") == [0, CONTEXT + ROOM]
    client.ok("drop 10")
    client.ok(f"alloc {20 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.driver() == CONTEXT + ROOM
    agent.start_agent()
    assert one.assert_exact() == CONTEXT + ROOM
    assert client.do(f"alloc {2 * MIB}") == REFUSED


@pytest.mark.timeout(900)
@pytest.mark.places("runc")
def test_the_next_start_releases_memory_of_processes_killed_with_agent_and_gatekeeper(
    agent: Service, tenant, scale
) -> None:
    """F3: agent, gatekeeper and programs are killed at one moment. The next start releases the programs' memory."""
    one = tenant(4 * CONTEXT + 2 * ROOM)
    stays = one.client()
    with one.growing():
        stays.ok(f"alloc {ROOM}")
    for _ in range(scale(3, 20, 200)):
        goes = [one.client() for _ in range(2)]
        goes[0].ok(f"alloc {ROOM}")
        goes[1].ok("context")
        goes[1].send(f"ask {4 * MIB} 0")
        assert agent.agent
        for pid in (agent.agent.pid, *agent.gatekeepers(), *(client.pid for client in goes)):
            os.kill(pid, signal.SIGKILL)
        agent.agent.wait(10)
        eventually(lambda: not {client.pid for client in goes} & set(one.pids()), 5, "no programs")  # noqa: B023
        assert stays.ok("info")[0] <= 2 * CONTEXT, "memory was released while no agent ran"
        eventually(lambda: not agent.gatekeepers(), 5, "the gatekeeper's end")
        agent.start_agent()
        eventually(lambda: one.memory()["used_bytes"] == CONTEXT + ROOM, 1, "the release of the memory")
        for client in goes:
            client.close()
    assert one.assert_exact() == CONTEXT + ROOM
    assert len(one.view()["processes"]) == 1


@pytest.mark.places("host", "runc")
def test_a_process_started_without_a_gatekeeper_gets_no_memory(agent: Service, tenant) -> None:
    one = tenant(CONTEXT + ROOM)
    one.assert_enforced()
    agent.kill_agent()
    agent.kill_gatekeeper()
    client = one.client()
    assert client.do("context") == REFUSED
    assert client.do(f"alloc {MIB}") == REFUSED
    assert one.driver() == 0
    agent.start_agent()
    eventually(lambda: client.do("context") == "ok", 3, "a context from the next gatekeeper")
    with one.growing(ROOM):
        client.ok(f"fill {2 * MIB} 0")
    assert one.assert_exact() == CONTEXT + ROOM


@pytest.mark.timed
@pytest.mark.slow
def test_the_fastest_of_three_starts_enforces_limits_within_three_seconds(agent: Service) -> None:
    seconds = []
    for _ in range(3):
        agent.kill_agent()
        agent.kill_gatekeeper()
        begun = quiet_seconds()
        agent.start_agent()
        seconds.append(quiet_seconds() - begun)
    assert min(seconds) < 3, seconds


@pytest.mark.timed
@pytest.mark.places("host")
@pytest.mark.parametrize("ends", ["while no agent runs", "after the next start"])
def test_the_cgroup_of_a_program_that_runs_across_a_detach_is_removed_later(agent: Service, ends: str) -> None:
    name = f"outlives-{os.getpid()}-{ends.count(' ')}"
    cgroup = cgroup_root() / "fgpu" / name
    run = subprocess.Popen([*FGPU, "run", "--memory", "1GiB", "--name", name, "--", "sleep", "60"], env=ENVIRONMENT)
    try:
        eventually(lambda: cgroup.exists() and (cgroup / "cgroup.procs").read_text(), 10, "the program")
        agent.detach()
        assert cgroup.exists()
        if ends == "after the next start":
            agent.start_agent()
            assert cgroup.exists()
    finally:
        run.kill()
        run.wait(10)
    agent.stand()
    eventually(lambda: not cgroup.exists(), 5, "the removal of the program's cgroup")


@pytest.mark.places("host")
def test_the_agent_sets_the_modes_of_lock_files_so_that_other_users_cannot_lock_them(agent: Service, tenant) -> None:
    """T45: flock() needs only permission to read."""
    one = tenant(CONTEXT + ROOM)
    one.assert_enforced()
    for name in ("agent.lock", "gatekeeper.lock"):
        (RUN_DIR / name).chmod(0o644)  # as an earlier version left it
    agent.kill_agent()
    agent.kill_gatekeeper()
    agent.start_agent()
    for name in ("agent.lock", "gatekeeper.lock"):
        file = RUN_DIR / name
        lock = ["flock", "--nonblock", file, "true"]
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *lock]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        assert (done.returncode, "Permission denied" in done.stderr) == (66, True), (name, done)
    with one.growing(ROOM):
        one.client().ok(f"alloc {ROOM}")


@contextlib.contextmanager
def service_gatekeeper() -> Iterator[subprocess.Popen[bytes]]:
    """Run a gatekeeper until the end of the block, as its systemd unit or its pod starts it."""
    command = [ROOT / ".venv/bin/python", "-m", "fgpu_ebpf.gatekeeper", "--wait", "--run-dir", RUN_DIR]
    with subprocess.Popen(command, env={"PATH": os.environ["PATH"]} | SERVICE_ENVIRONMENT) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.places("host")
def test_the_agent_s_gatekeeper_exits_when_a_service_starts_a_gatekeeper(agent: Service, tenant) -> None:
    """F30: a gatekeeper that systemd or a pod starts never waits until the agent exits."""
    one = tenant(2 * CONTEXT + ROOM)
    one.assert_enforced()
    (own,) = agent.gatekeepers()
    held = one.client()
    held.ok(f"alloc {ROOM // 2}")
    with service_gatekeeper() as other:
        assert other.pid != own
        eventually(lambda: agent.gatekeepers() == {other.pid}, 5, "the service's gatekeeper as the only one")
        with one.growing(ROOM // 2):
            one.client().ok(f"alloc {ROOM // 2}")
        time.sleep(2)  # the agent starts a gatekeeper if none has run for a second
        assert agent.gatekeepers() == {other.pid}
    eventually(lambda: agent.gatekeepers() - {other.pid}, 5, "another gatekeeper of the agent")
    assert one.client().do(f"alloc {2 * MIB}") == REFUSED  # the kernel still has the limit
    assert one.assert_exact() == 2 * CONTEXT + ROOM


@pytest.mark.slow
@pytest.mark.places("host")
def test_a_killed_gatekeeper_is_replaced_within_three_seconds(agent: Service, tenant) -> None:
    deadline = Deadline(4)
    agent.kill_gatekeeper()
    eventually(agent.gatekeepers, 3, "another gatekeeper")
    one = tenant(CONTEXT + ROOM)
    with one.growing():
        one.client().ok(f"alloc {ROOM}")
    assert not deadline.is_over()


@pytest.mark.slow
@pytest.mark.places("host")
def test_detach_leaves_no_shim_folder_pin_process_or_limit(agent: Service, tenant) -> None:
    one = tenant(CONTEXT + ROOM)
    client = one.client()
    with one.growing():
        client.ok(f"fill {2 * MIB} 0")
    agent.kill_agent()  # so that its gatekeeper is not a child of the next agent
    agent.start_agent()
    assert agent.agent is not None
    fgpu("detach")
    assert agent.agent.wait(30) == 0
    eventually(lambda: not agent.gatekeepers(), 2, "the gatekeeper's end")
    assert not Path("/run/fgpu/shim").exists()
    assert not list(Path("/sys/fs/bpf").glob("fgpu/*"))
    assert fgpu("status", check=False).returncode == 3
    eventually(lambda: client.do(f"alloc {GIB}").startswith("ok"), 3, "memory without fgpu")
    one.end()
    assert not one.cgroup.exists()
