"""F1: agent and gatekeeper are killed in the middle of a change, at every point that tests/failpoints.py has.

Running programs are not affected. The next start completes the interrupted change: the limits are those that were
requested, and the ledger is exact.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.nursery_kit import Child, Children, children_of
from tests.support.commands import ask, fgpu, metrics
from tests.support.host import CONTEXT, ENVIRONMENT, GIB, MIB, RUN_DIR, cgroup_root
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually, remove_cgroup

BUSY = 3  # clients of a tenant whose requests always fit; the requests of a fourth client never fit
LIMIT = (BUSY + 2) * CONTEXT + 64 * MIB  # a client that starts later is the fifth
STEP = 2 * MIB
GATEKEEPERS, AGENTS = 5, 3  # how many are killed during their start, one after another
LEVEL = f"fgpu-half-{os.getpid()}-"  # the prefix of the names of its levels, which no other run uses
POLICY = f"""
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: half}}
spec:
  selector: {{cgroup: ["{LEVEL}*"]}}
  memory: {{limit: %dMiB}}
"""


class Host:
    """The service, the programs that replace it, and changes of levels and limits on this host during the test."""

    def __init__(self, service: Service, children: Children) -> None:
        self.service, self.children = service, children
        self._number, self._limit = 0, 0
        self._levels: list[Path] = []
        self._people: list[subprocess.Popen[bytes]] = []

    def change(self) -> None:
        """Change the limit of two levels, add a third one, and remove the oldest."""
        self._limit = 512 + self._number % 64
        self._number += 1
        (self.service.policies / "half.yaml").write_text(POLICY % self._limit)
        while len(self._levels) < 4:
            self._add()
        self._remove(0)
        self._add()

    def _add(self) -> None:
        level = cgroup_root() / f"{LEVEL}{time.monotonic_ns()}"
        level.mkdir()
        self._levels.append(level)
        self._people.append(subprocess.Popen(["sleep", "infinity"], env=ENVIRONMENT))
        (level / "cgroup.procs").write_text(str(self._people[-1].pid))

    def _remove(self, which: int) -> None:
        person, level = self._people.pop(which), self._levels.pop(which)
        person.kill()
        person.wait(30)
        remove_cgroup(level)

    def assert_in_force(self) -> None:
        """Check that every level has the limit of the policy, and that no earlier limit is left."""
        wanted = {f"/{level.name}": self._limit * MIB for level in self._levels}

        def limits() -> dict[str, int]:
            here = (t for t in ask(verb="snapshot")["tenants"] if t["path"].startswith(f"/{LEVEL}"))
            return {t["path"]: t["devices"][0]["limit_bytes"] for t in here}

        eventually(lambda: limits() == wanted, 5, f"the policy's limits, not {limits()}")

    def close(self) -> None:
        """Remove the levels, and start the service again."""
        self.children.end()
        if self.service.agent is None or self.service.agent.poll() is not None:
            self.service.start_agent()
        while self._levels:
            self._remove(0)
        (self.service.policies / "half.yaml").unlink(missing_ok=True)
        eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy")


@pytest.fixture
def host(service: Service, unharmed: None) -> Iterator[Host]:
    """Return a host without an agent. Afterwards the service runs as before."""
    with children_of(service) as children:
        host = Host(service, children)
        service.kill_agent()
        yield host
        host.close()


# -- kills, each at its point: no agent runs before or after it


def assert_killed(program: Child) -> None:
    """Check that the program reached its point."""
    assert program.wait(30) == -signal.SIGKILL, "the program exited, but not at its point"


def at_start(host: Host, tenant: Tenant, point: str) -> None:
    """Kill the agent during its start, at a step that applies the changes since the previous kill."""
    host.change()
    assert_killed(host.children.begin("agent", point))


def at_any_moment(host: Host, tenant: Tenant, point: str) -> None:
    """Kill a running gatekeeper, then some in their starts; then do the same with agents."""
    host.children.kill_gatekeeper()
    for _ in range(GATEKEEPERS):
        host.children.start_and_kill("gatekeeper")
    host.children.start("gatekeeper")
    for _ in range(AGENTS):
        host.change()
        host.children.start_and_kill("agent")


def at_a_set(host: Host, tenant: Tenant, point: str) -> None:
    """Kill the agent during `fgpu set`, which reports the failure. An unsaved limit is not in force afterwards."""
    agent = host.children.start("agent", point)
    assert fgpu("set", tenant.path, "--memory", "15GiB", check=False).returncode
    assert_killed(agent)


def at_a_gatekeepers_start(host: Host, tenant: Tenant, point: str) -> None:
    host.children.kill_gatekeeper()
    assert_killed(host.children.begin("gatekeeper", point))


def at_a_hello(host: Host, tenant: Tenant, point: str) -> None:
    """Kill the gatekeeper before it answers a hello. The next gatekeeper answers it."""
    host.children.kill_gatekeeper()
    gatekeeper = host.children.start("gatekeeper", point)
    host.children.start()
    assert_killed(gatekeeper)  # the busy clients, which register again, bring it to its point
    newcomer = tenant.client()
    eventually(lambda: newcomer.do("context") == "ok", 5, "a context from the next gatekeeper")
    newcomer.kill()
    eventually(lambda: newcomer.pid not in tenant.pids(), 5, "the exit of the newcomer")
    host.children.kill_agent()


def at_a_load(host: Host, tenant: Tenant, point: str) -> None:
    """Kill the agent while it replaces the programs."""
    for stamp in Path("/sys/fs/bpf/fgpu").glob("v*/loaded-*"):
        stamp.rmdir()
    assert_killed(host.children.begin("agent", point))


POINTS: dict[str, Callable[[Host, Tenant, str], None]] = {
    "limit_unpublished": at_start,
    "policy_half": at_start,
    "page_unannounced": at_start,
    "charges_behind": at_start,
    "level_half_gone": at_start,
    "any_moment": at_any_moment,
    "state_unrenamed": at_a_set,
    "socket_unrenamed": at_a_gatekeepers_start,
    "hello_unanswered": at_a_hello,
    "programs_half": at_a_load,
}


# -- the load


class Load:
    """Four busy clients of a tenant: requests of three fit (of one from a pool), requests of the fourth never fit."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant, self._before = tenant, tenant.memory()["witnessed_bytes"]
        self._fitting = [self._asking(words) for words in (f"{STEP} 0", f"{STEP} 0", f"{STEP} 0 1")]
        self._hopeless = self._asking(f"{32 * GIB} 0")

    def _asking(self, words: str) -> Client:
        client = self.tenant.client(before="nice -n 19")  # so that a restarted client waits for no other client
        client.ok("context")
        client.send(f"ask {words}")
        return client

    def stop(self) -> None:
        """Stop the clients, and check the results of each."""
        for client in (*self._fitting, self._hopeless):
            client.send("context")
        taken = []
        for client in self._fitting:
            got, refused, other = client.numbers(client.receive(), "fits")
            assert (refused, other) == (0, 0), "a request that fits was not admitted"
            taken.append(got)
        assert all(taken)
        got, refused, other = self._hopeless.numbers(self._hopeless.receive(), "hopeless")
        assert (got, other) == (0, 0), "a request that does not fit was admitted"
        assert refused > 0
        for client in (*self._fitting, self._hopeless):
            assert client.receive() == "ok"
        witnessed = self.tenant.memory()["witnessed_bytes"] - self._before
        assert witnessed == sum(taken[:2]) * STEP, "witnessed never, or more than once: pools are not witnessed"


@pytest.mark.timeout(7200)
@pytest.mark.places("host")
def test_a_kill_at_any_point_of_agent_or_gatekeeper_affects_no_tenant(host: Host, tenant, scale) -> None:
    """A quick run has 18 kills, nine of them at a random moment. The usual run has 63, and a full run 1,017."""
    host.children.start()
    tenants = [tenant(LIMIT) for _ in range(2)]
    for one in tenants:
        one.assert_enforced()
    loads = [Load(one) for one in tenants]
    for point in [*POINTS] * scale(1, 1, 50) + ["any_moment"] * scale(0, 5, 13):
        host.children.kill_agent()
        POINTS[point](host, tenants[0], point)
        for one in tenants:
            assert one.driver() <= LIMIT, f"memory beyond the limit after {point}"
        host.children.start()
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
    """Return a tenant and its client, which has 20 of 64 MiB. No agent runs."""
    host.children.start()
    one = tenant(CONTEXT + 64 * MIB)
    client = one.client()
    with one.growing():
        client.ok(f"alloc {20 * MIB}")
    host.children.kill_agent()
    return one, client


def assert_taken_up(one: Tenant, client: Client) -> None:
    """Check that the client's memory is charged, and that the client can allocate the rest of the limit."""
    one.assert_enforced()
    assert one.assert_exact() == CONTEXT + 20 * MIB
    with one.growing(44 * MIB):
        client.ok(f"fill {STEP} 0")
    assert one.assert_exact() == CONTEXT + 64 * MIB == one.memory()["limit_bytes"]


@pytest.mark.places("host")
def test_fgpu_detach_completes_the_detach_of_a_killed_agent(host: Host, held: tuple[Tenant, Client]) -> None:
    one, client = held
    agent = host.children.start("agent", "detach_half")
    fgpu("detach")
    assert_killed(agent)
    assert not list(Path("/sys/fs/bpf").glob("fgpu/*"))
    assert not (RUN_DIR / "overrides.json").exists()
    host.service.start_agent()
    fgpu("set", one.path, "--memory", f"{CONTEXT + 64 * MIB}B")
    eventually(lambda: one.memory()["used_bytes"] == CONTEXT + 20 * MIB, 5, "the charge of the held memory")
    client.ok(f"fill {STEP} 0")
    one.assert_enforced()  # not earlier: a process that has made no request yet is unknown
    assert one.assert_exact() == CONTEXT + 64 * MIB == one.memory()["limit_bytes"]


@pytest.mark.places("host")
def test_the_next_start_completes_the_probes_of_a_partly_probed_driver(host: Host, held: tuple[Tenant, Client]) -> None:
    subprocess.run(["rm", "-r", *Path("/sys/fs/bpf/fgpu").glob("v*/links")], check=True)
    assert_killed(host.children.begin("agent", "links_half"))
    host.service.start_agent()
    assert_taken_up(*held)
