"""A version of fgpu with another layout of pinned maps starts: every limit stays in force at every moment.

Each test changes to the next layout and back. Tenants by policy, by `fgpu set` and by `fgpu run` are at their limits.
Some of their programs request more memory all the time, and others start all the time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e.held_kit import LIMIT, STEP
from tests.e2e.layout_kit import Version, change
from tests.support.commands import fgpu, metrics
from tests.support.host import CONTEXT, REFUSED
from tests.support.place import Cgroups, Place
from tests.support.service import Service
from tests.support.sim_driver import driver_books
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: layouts}}
spec:
  selector: {{cgroup: ["{group}/*"]}}
  memory: {{limit: {bytes}B}}
"""


@pytest.fixture
def store(service: Service, unharmed: None, versions: tuple[Version, Version], tmp_path: Path) -> Iterator[Path]:
    """Return the folder of shims of both versions. This version runs. Afterwards the service's own agent runs."""
    store = tmp_path / "store"
    change(service, versions[0], store, signal.SIGTERM)
    yield store
    service.kill_agent(signal.SIGTERM)
    service.start_agent()


@dataclass
class Full:
    """A tenant at its limit. `before` starts a program with the shim of the running version."""

    tenant: Tenant
    before: str
    limit: int
    programs: list[Client] = field(default_factory=list)

    def fill(self) -> None:
        """Allocate the whole limit in one program."""
        client = self.tenant.client(before=self.before)
        client.ok("context")
        for _ in range((self.limit - CONTEXT) // STEP):
            client.ok(f"alloc {STEP}")
        self.programs = [client]

    def ask(self) -> None:
        """Make each program request more memory until got() is called."""
        for client in self.programs:
            client.send(f"ask {STEP} 0")

    def got(self) -> int:
        """Return how often a request of a program succeeded since ask()."""
        found = 0
        for client in self.programs:
            client.send("context")
            found += client.numbers(client.receive())[0]
            client.receive()
        return found

    def end(self) -> None:
        """Kill the tenant's programs."""
        for client in self.programs:
            client.kill()
            client.close()
        eventually(lambda: not self.tenant.driver() and not self.tenant.memory()["used_bytes"], 10, "no memory")


class Watch:
    """A thread that reads the driver's bytes, and starts programs in each tenant one after another, until end()."""

    def __init__(self, tenants: list[Full]) -> None:
        self._tenants, self._ended = tenants, threading.Event()
        self.most, self.started, self.got = Counter[str](), Counter[str](), list[str]()
        self._threads = [threading.Thread(target=self._look, daemon=True)]
        self._threads += [threading.Thread(target=self._start, args=(one,), daemon=True) for one in tenants]
        for thread in self._threads:
            thread.start()

    def _look(self) -> None:
        while not self._ended.is_set():
            pids = {one.tenant.name: set(one.tenant.pids()) for one in self._tenants}
            books = driver_books()
            for name, own in pids.items():
                held = sum(entry["bytes"] for entry in books if entry["pid"] in own and not entry["ended"])
                self.most[name] = max(self.most[name], held)

    def _start(self, one: Full) -> None:
        while not self._ended.is_set():
            client = one.tenant.client(before=one.before)
            said = client.do("context")
            client.close()
            self.started[one.tenant.name] += 1
            if said.startswith("ok"):
                self.got.append(one.tenant.name)
            eventually(lambda pid=client.pid: pid not in one.tenant.pids(), 10, "the exit of the program")

    def end(self) -> None:
        """Start no more programs."""
        self._ended.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()


def left_behind(one: Full) -> None:
    """Leave a child that has the descriptors of an exited program, so that the driver keeps its memory."""
    one.fill()
    one.programs[0].ok("linger")
    one.programs.pop().kill()
    eventually(lambda: one.tenant.memory()["orphaned_bytes"] == one.limit, 10, "the orphaned memory")


@dataclass
class World:
    """Tenants whose program holds the whole limit, and one with memory in the row of an exited process."""

    tenants: list[Full]
    hidden: list[Full]


@pytest.fixture
def world(service: Service, store: Path, tmp_path: Path) -> Iterator[World]:
    """Return tenants at their limits, one by policy, one by `fgpu set`, one by `fgpu run`, and a further tenant."""
    cgroups, place = Cgroups(tmp_path), Place(tmp_path)
    policy = service.policies / "layouts.yaml"
    policy.write_text(POLICY.format(group=cgroups.group.lstrip("/"), bytes=LIMIT))
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 1, 5, "the policy")
    shim = f"env LD_PRELOAD={store}/current/libfgpu.so"
    made = [(cgroups.tenant(None), shim), (cgroups.tenant(LIMIT), shim), (place.tenant(LIMIT), "")]
    tenants = [Full(tenant, before, LIMIT) for tenant, before in made]
    hidden = [Full(cgroups.tenant(None), shim, LIMIT)]
    for one in (*tenants, *hidden):
        one.tenant.assert_enforced()
    for one in tenants:
        one.fill()
    left_behind(hidden[0])
    yield World(tenants, hidden)
    for pid in hidden[0].tenant.pids():
        os.kill(pid, signal.SIGKILL)
    for made_in in (cgroups, place):
        made_in.close()
    policy.unlink()


def assert_over(service: Service, to: Version, store: Path, how: signal.Signals, world: World) -> None:
    """Check that no program gets a byte while an agent of another version replaces this one, and shortly after."""
    for one in world.tenants:
        one.ask()
    watch = Watch([*world.tenants, *world.hidden])
    change(service, to, store, how)
    time.sleep(3)
    watch.end()
    print(watch.most, watch.started)
    assert {one.tenant.name for one in world.tenants if watch.most[one.tenant.name] > one.limit} == set()
    assert watch.got == []
    assert [one.got() for one in world.tenants] == [0] * len(world.tenants)


def assert_shown(tenants: list[Full]) -> None:
    """Check that the ledger equals the driver's figures, and that the limits are shown."""
    said = fgpu("status").stdout
    for one in tenants:
        assert one.tenant.assert_exact() == one.limit
        assert one.tenant.memory()["limit_bytes"] == one.limit
        assert [line for line in said.splitlines() if one.tenant.name in line and " 558" in line], said


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_limits_hold_over_an_upgrade_and_a_downgrade_to_another_layout(
    service: Service, versions: tuple[Version, Version], store: Path, world: World
) -> None:
    """The upgrade uses SIGTERM. The downgrade uses SIGKILL, which leaves a gatekeeper of the other layout."""
    for to, how in ((versions[1], signal.SIGTERM), (versions[0], signal.SIGKILL)):
        assert_over(service, to, store, how, world)
        assert_shown(world.tenants)
        memory = world.hidden[0].tenant.memory()
        assert memory["used_bytes"] == memory["orphaned_bytes"] == LIMIT
        for one in world.tenants:  # a program of this version has its exact limit
            one.end()
            one.fill()
            assert one.programs[0].do(f"alloc {STEP}") == REFUSED
            assert one.tenant.assert_exact() == LIMIT
