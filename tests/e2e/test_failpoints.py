"""F1: agent, gatekeeper and loader end in the middle of a change, at every point that tests/failpoints.py has.

Programs that are at work notice nothing meanwhile, and the next start takes up what is half done: limits are those
that were asked for, and the books are exact.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import (
    CONTEXT,
    DRIVER_ROOT,
    ENVIRONMENT,
    FGPU,
    GIB,
    LISTEN,
    MIB,
    ROOT,
    RUN_DIR,
    SHIM,
    Client,
    Service,
    Tenant,
    ask,
    cgroup_root,
    eventually,
    fgpu,
    metrics,
)

FAILPOINTS = ROOT / "tests/failpoints.py"
BUSY = 3  # clients of a tenant that always fit; one more never does
LIMIT = (BUSY + 2) * CONTEXT + 64 * MIB  # one that comes later is the fifth
STEP = 2 * MIB
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: half}}
spec:
  selector: {{cgroup: ["fgpu-half-*"]}}
  memory: {{limit: {0}MiB}}
"""


class Host:
    """The service, and what changes on this host while it is away: levels come and go, and get other limits."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._number, self._limit = 0, 0
        self._levels: list[Path] = []
        self._people: list[subprocess.Popen[bytes]] = []

    def change(self) -> None:
        """Two levels have another limit, a third comes to be, the oldest goes."""
        self._limit = 512 + self._number % 64
        self._number += 1
        (self.service.policies / "half.yaml").write_text(POLICY.format(self._limit))
        while len(self._levels) < 4:
            self._add()
        self._remove(0)
        self._add()

    def _add(self) -> None:
        level = cgroup_root() / f"fgpu-half-{os.getpid()}-{time.monotonic_ns()}"
        level.mkdir()
        self._levels.append(level)
        self._people.append(subprocess.Popen(["sleep", "infinity"], env=ENVIRONMENT))
        (level / "cgroup.procs").write_text(str(self._people[-1].pid))

    def _remove(self, which: int) -> None:
        person, level = self._people.pop(which), self._levels.pop(which)
        person.kill()
        person.wait(5)
        eventually(lambda: not (level / "cgroup.procs").read_text(), 5, "an empty cgroup")
        level.rmdir()

    def assert_in_force(self) -> None:
        """Every level has the limit of the policy, and none of another time is left."""
        wanted = {f"/{level.name}": self._limit * MIB for level in self._levels}

        def limits() -> dict[str, int]:
            here = (t for t in ask(verb="snapshot")["tenants"] if t["path"].startswith("/fgpu-half-"))
            return {t["path"]: t["devices"][0]["limit_bytes"] for t in here}

        eventually(lambda: limits() == wanted, 5, f"the policy's limits, not {limits()}")

    def close(self) -> None:
        """Nothing is left of it."""
        while self._levels:
            self._remove(0)
        (self.service.policies / "half.yaml").unlink(missing_ok=True)
        eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy")


@pytest.fixture
def host(service: Service, unharmed: None) -> Iterator[Host]:
    """Afterwards the service is as it was."""
    host = Host(service)
    yield host
    if service.agent is None or service.agent.poll() is not None:
        service.start_agent()
    host.close()


# -- ends, each at its point


def begin(host: Host, point: str, program: str, *options: str | Path) -> subprocess.Popen[bytes]:
    """A program of ours that will end there; no point: one as it is installed."""
    command = [sys.executable, FAILPOINTS, program, *options] if point else [*FGPU, program, *options]
    environment = {"PATH": ENVIRONMENT["PATH"], "FGPU_FAILPOINT": point}
    with open(host.service.log, "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)


def begin_agent(host: Host, point: str, *options: str | Path) -> subprocess.Popen[bytes]:
    """The agent, in the place of the service's, which must be away."""
    files = ("--config", host.service.config, "--policies", host.service.policies)
    where = ("--driver-root", DRIVER_ROOT, "--shim", SHIM, "--listen", LISTEN)
    return begin(host, point, "agent", *where, *files, *options)


def assert_killed(program: subprocess.Popen[bytes]) -> None:
    """It came to its point."""
    assert program.wait(30) == -signal.SIGKILL, "it ended, but not at its point"


def at_start(host: Host, tenant: Tenant, point: str) -> None:
    """The agent ends at what has changed since the last one ended."""
    host.service.kill_agent()
    host.change()
    assert_killed(begin_agent(host, point))


def at_a_set(host: Host, tenant: Tenant, point: str) -> None:
    """The agent ends when somebody sets a limit, who is told; what is not kept is not in force afterwards."""
    host.service.kill_agent()
    agent = begin_agent(host, point)
    eventually(lambda: agent.poll() is not None or not fgpu("status", check=False).returncode, 30, "an agent")
    assert fgpu("set", tenant.path, "--memory", "15GiB", check=False).returncode
    assert_killed(agent)


def at_a_gatekeepers_start(host: Host, tenant: Tenant, point: str) -> None:
    host.service.kill_agent()
    host.service.kill_gatekeeper()
    assert_killed(begin(host, point, "gatekeeper", "--run-dir", RUN_DIR))


def at_a_hello(host: Host, tenant: Tenant, point: str) -> None:
    """The gatekeeper ends before it answers; who asked is answered by the next one."""
    host.service.kill_agent()
    host.service.kill_gatekeeper()
    gatekeeper = begin(host, point, "gatekeeper", "--run-dir", RUN_DIR)
    host.service.start_agent()
    assert_killed(gatekeeper)  # by the busy ones, who say hello again
    newcomer = tenant.client()
    eventually(lambda: newcomer.do("context") == "ok", 5, "a context once there is a gatekeeper")
    newcomer.kill()
    eventually(lambda: newcomer.pid not in tenant.pids(), 5, "its end")
    host.service.kill_agent()


def at_a_load(host: Host, tenant: Tenant, point: str) -> None:
    """The loader ends; the agent says so and gives up."""
    host.service.kill_agent()
    for stamp in Path("/sys/fs/bpf/fgpu").glob("v*/loaded-*"):
        stamp.rmdir()
    said = host.service.log.stat().st_size
    loader = f"/usr/bin/env FGPU_FAILPOINT={point} /usr/bin/python3 -I {FAILPOINTS}"
    agent = begin_agent(host, "", "--loader", loader)
    assert agent.wait(60) == 1
    assert b"the loader ended with -9" in host.service.log.read_bytes()[said:]


POINTS: dict[str, Callable[[Host, Tenant, str], None]] = {
    "limit_unpublished": at_start,
    "policy_half": at_start,
    "page_unannounced": at_start,
    "charges_behind": at_start,
    "level_half_gone": at_start,
    "state_unrenamed": at_a_set,
    "socket_unrenamed": at_a_gatekeepers_start,
    "hello_unanswered": at_a_hello,
    "programs_half": at_a_load,
}


# -- the load


class Load:
    """Four clients of a tenant, all busy: two that fit, one that does in a pool, one that never does."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant, self._before = tenant, tenant.memory()["witnessed_bytes"]
        self._fitting = [self._asking(words) for words in (f"{STEP} 0", f"{STEP} 0", f"{STEP} 0 1")]
        self._hopeless = self._asking(f"{32 * GIB} 0")

    def _asking(self, words: str) -> Client:
        client = self.tenant.client(before="nice -n 19")  # whoever begins anew is not kept waiting by all of them
        client.ok("context")
        client.send(f"ask {words}")
        return client

    def stop(self) -> None:
        """What must be true of each."""
        for client in (*self._fitting, self._hopeless):
            client.send("context")
        taken = []
        for client in self._fitting:
            got, refused, other = client.numbers(client.receive(), "fits")
            assert (refused, other) == (0, 0), "one that fits noticed"
            taken.append(got)
        assert all(taken)
        got, refused, other = self._hopeless.numbers(self._hopeless.receive(), "hopeless")
        assert (got, other) == (0, 0), "the hopeless one got memory"
        assert refused > 0
        for client in (*self._fitting, self._hopeless):
            assert client.receive() == "ok"
        witnessed = self.tenant.memory()["witnessed_bytes"] - self._before
        assert witnessed == sum(taken[:2]) * STEP, "passed unseen, or seen twice: pools are not witnessed"


@pytest.mark.timeout(7200)
@pytest.mark.places("host")
def test_whoever_ends_at_any_point_harms_nobody_and_leaves_nothing(host: Host, tenant, scale) -> None:
    tenants = [tenant(LIMIT) for _ in range(2)]
    for one in tenants:
        one.assert_enforced()
    loads = [Load(one) for one in tenants]
    for number in range(scale(len(POINTS), len(POINTS), 1000)):
        point = list(POINTS)[number % len(POINTS)]
        POINTS[point](host, tenants[0], point)
        for one in tenants:
            assert one.driver() <= LIMIT, f"beyond the limit after {point}"
        host.service.start_agent()
        for one in tenants:
            one.assert_enforced()
            memory = one.memory()
            assert memory["used_bytes"] <= memory["peak_bytes"] <= memory["limit_bytes"] == LIMIT, point
        host.assert_in_force()
    for load in loads:
        load.stop()
    for one in tenants:
        assert one.assert_exact() == (BUSY + 1) * CONTEXT


@pytest.fixture
def held(host: Host, tenant) -> tuple[Tenant, Client]:
    """A tenant and its client, which has 20 of 64 MiB; no agent."""
    one = tenant(CONTEXT + 64 * MIB)
    client = one.client()
    with one.growing():
        client.ok(f"alloc {20 * MIB}")
    host.service.kill_agent()
    return one, client


def assert_taken_up(one: Tenant, client: Client) -> None:
    """What it held is charged, and what is left can be taken."""
    one.assert_enforced()
    assert one.assert_exact() == CONTEXT + 20 * MIB
    with one.growing(44 * MIB):
        client.ok(f"fill {STEP} 0")
    assert one.assert_exact() == CONTEXT + 64 * MIB == one.memory()["limit_bytes"]


@pytest.mark.places("host")
def test_a_detach_that_ends_half_way_is_ended_by_the_command(host: Host, held: tuple[Tenant, Client]) -> None:
    one, client = held
    agent = begin_agent(host, "detach_half")
    eventually(lambda: agent.poll() is not None or not fgpu("status", check=False).returncode, 30, "an agent")
    fgpu("detach")
    assert_killed(agent)
    assert not list(Path("/sys/fs/bpf").glob("fgpu/*"))
    assert not (RUN_DIR / "overrides.json").exists()
    host.service.start_agent()
    fgpu("set", one.path, "--memory", str(CONTEXT + 64 * MIB))
    assert_taken_up(one, client)


@pytest.mark.places("host")
def test_a_driver_that_is_half_probed_is_probed_by_the_next_start(host: Host, held: tuple[Tenant, Client]) -> None:
    subprocess.run(["rm", "-r", *Path("/sys/fs/bpf/fgpu").glob("v*/links")], check=True)
    assert_killed(begin_agent(host, "links_half"))
    host.service.start_agent()
    assert_taken_up(*held)
