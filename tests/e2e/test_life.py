"""Random lives: programs that allocate and free in every way, and exit. The ledger equals the driver at every check.

A life that uses pools may be charged more than the driver holds: the bytes that a destroyed pool still had in use, or
that a pool has granted and the driver took back. Its drift is exactly that.

Lives also share memory, and leave some behind: descriptors of exports in sockets, and forked children and executed
programs that keep the driver's descriptors. Before a check every living process closes what it shares. The remaining
memory of exited processes is orphaned, and must be gone as soon as the driver has freed it.

FGPU_TEST_SEED repeats a run, FGPU_TEST_ROUNDS makes it longer or shorter.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ask, fgpu, metrics, orphans
from tests.support.host import BUILD, CONTEXT, FGPU, GIB, MIB, ROOT, cgroup_root, new_seed
from tests.support.place import Place
from tests.support.service import Service
from tests.support.sim_driver import unnamed_bytes
from tests.support.tenant import Program, Tenant
from tests.support.wait import eventually, remove_cgroup

LIMIT = 6 * GIB
THREADS = 2
A_FEW, MANY, MOST = (
    170,
    6_700,
    16_700,
)  # operations of a thread per round. The sum over three lives is 5 x 10^5 in CI, and 10^8 in a full run
MOVES = True  # the kernel and the agent follow a process from one cgroup to another
WORKING = True  # whether the levels of a working process may change
IMPOSSIBLE = ("release", "full", "device", "lost")  # anomalies that no life may cause
FLOOD_SECONDS, FLOOD_MOVES = 2.2, 5000  # at most 4,000 events a second enter the ring; it has room for 4,369
REFUSALS = "fgpu_memory_refused_total"
SMALL = {"MOST_ALLOCATIONS": 64, "MOST_THREADS": 32, "MOST_PROCESSES": 16, "EVENT_BYTES": 4096}


class Life(Program):
    """The program tests/programs/life.c, with two threads."""

    _numbers = itertools.count(1)

    def __init__(self, tenant: Tenant, seed: int, ways: str = "plain") -> None:
        self.ways, self.busy, self.refused, self.contexts = ways, False, 0, 0
        super().__init__(tenant, f"life{next(self._numbers)}", f"{BUILD}/e2e/life {seed} {THREADS} {ways}")
        self._be_born()

    def _be_born(self) -> None:
        word, result, pid = self.receive(30).split()
        assert word == "ready"
        self.pid, self.contexts = int(pid), int(result == "0")

    def begin(self, operations: int) -> None:
        """Begin a round with this many operations of each thread."""
        self.send(str(operations))
        self.busy = True

    def end(self) -> int:
        """Return the number of operations since begin()."""
        word, done, refused, contexts = self.receive(150).split()
        assert word == "ok"
        self.busy = False
        self.refused, self.contexts = int(refused), int(contexts)
        return int(done)

    def close_shared(self) -> None:
        """Close all descriptors that keep memory, and wait for forked children."""
        self.send("close")
        assert self.receive().split()[0] == "ok"

    def execute_again(self, seed: int) -> None:
        """Execute the program again, from the first thread or another one, while it holds memory."""
        self.send(f"exec {seed}")
        self._be_born()

    def leave(self) -> None:
        """End the first thread. Another one continues."""
        self.send("leave")
        assert self.receive().split()[0] == "ok"

    def kill(self) -> None:
        """Kill the process with SIGKILL, at work or not."""
        os.kill(self.pid, 9)
        eventually(lambda: self.pid not in self.tenant.pids(), 5, "the exit of the life")
        self.close()


class World:
    """Tenants, the lives in them, and all events that may affect them."""

    def __init__(
        self,
        service: Service,
        place: Place,
        chance: random.Random,
        ways: tuple[str, ...],
        pace: int = A_FEW,
        crowded: bool = False,
    ) -> None:
        self.service, self.place, self.chance, self.pace, self.crowded = service, place, chance, pace, crowded
        self.tenants = [place.tenant(LIMIT) for _ in range(2)]
        for one in self.tenants:
            one.assert_enforced()
        self.grouped = False
        self.operations = self.refused = self.floods = self.drift = 0
        self.lives: list[Life] = []
        for number, way in enumerate(ways):
            self._bear(self.tenants[number // 2], way)

    def _seed(self) -> int:
        return self.chance.randrange(1 << 30)

    def _bear(self, tenant: Tenant, ways: str) -> None:
        self.lives.append(Life(tenant, self._seed(), ways))
        self._assert_alive(self.lives[-1])

    def _assert_alive(self, life: Life) -> None:
        """Check that the life has a context."""
        assert self.crowded or life.contexts, f"no context of the life in {life.tenant.name}: {self._books()}"

    def _books(self) -> list[Any]:
        """Return the bytes that ledger and driver hold of each tenant.

        The ledger's figures are totals and per process.
        """
        seen = [(one, one.view()) for one in self.tenants]
        return [(one.name, of["devices"], of["processes"], one.driver_by_device()) for one, of in seen]

    # -- events

    def _kill_one(self) -> Life:
        victim = self.chance.choice(self.lives)
        victim.kill()
        self.lives.remove(victim)
        return victim

    def die(self) -> None:
        """Kill a life with SIGKILL, and start another."""
        victim = self._kill_one()
        self._stretch()
        self._bear(victim.tenant, victim.ways)

    def _stretch(self) -> None:
        """Raise all limits, so that a new life has room for a context."""
        if self.grouped:
            fgpu("set", self.place.group, "--memory", "16GiB")
        for one in self.tenants:
            fgpu("set", one.path, "--memory", f"{LIMIT}B")

    def execute(self) -> None:
        """Replace the program of an idle life by another one in the same process."""
        life = self.chance.choice(self.lives)
        if not life.busy:
            self._stretch()
            life.execute_again(self._seed())
            self._assert_alive(life)

    def leave(self) -> None:
        """End the first thread of a life."""
        life = self.chance.choice(self.lives)
        if not life.busy:
            life.leave()

    def limit(self) -> None:
        """Set another limit, perhaps below the bytes in use."""
        fgpu("set", self.chance.choice(self.tenants).path, "--memory", f"{self.chance.randrange(2, 6)}GiB")

    def regroup(self) -> None:
        """Set a limit on the cgroup around all tenants, which already have charges, or remove that limit."""
        if not WORKING and any(life.busy for life in self.lives):
            return
        if self.grouped:
            fgpu("unset", self.place.group)
        else:
            fgpu("set", self.place.group, "--memory", f"{self.chance.randrange(3, 13)}GiB")
        self.grouped = not self.grouped

    def move(self) -> None:
        """Move a living process to another tenant's cgroup."""
        life = self.chance.choice(self.lives)
        if MOVES and (WORKING or not life.busy):
            life.tenant = self.chance.choice(self.tenants)
            (life.tenant.cgroup / "cgroup.procs").write_text(str(life.pid))

    def restart_agent(self) -> None:
        """Kill the agent with SIGKILL, and start another."""
        self.service.kill_agent()
        self.service.start_agent()

    def restart_gatekeeper(self) -> None:
        """Kill the gatekeeper with SIGKILL. The agent starts another."""
        self.service.kill_gatekeeper()
        eventually(self.service.gatekeepers, 3, "another gatekeeper")

    def lose_events(self) -> None:
        """Stop the agent until the ring is full, and cause events that the agent would have received."""
        agent = self.service.agent
        assert agent is not None
        before = _lost()
        agent.send_signal(signal.SIGSTOP)
        try:
            _flood(self.place)
            self.move()
            victim = self._kill_one()
        finally:
            agent.send_signal(signal.SIGCONT)
        assert _lost() > before, "no event was lost"
        self.floods += 1
        self._stretch()
        self._bear(victim.tenant, victim.ways)

    def happen(self) -> None:
        """Sometimes cause one of these events, between two rounds or during a round."""
        steps = (self.die, self.execute, self.leave, self.limit, self.regroup, self.move)
        steps += (self.restart_agent, self.restart_gatekeeper, self.lose_events)
        if self.chance.randrange(3):
            self.chance.choice(steps)()

    # -- rounds and checks

    def turn(self) -> None:
        """Run one round of all lives, including lives that start during the round, while events happen."""
        for life in self.lives:
            life.begin(self.pace)
        if self.chance.randrange(2):
            self.happen()
        for life in self.lives:
            if not life.busy:
                life.begin(self.pace)
        for life in self.lives:
            self.operations += life.end()
            self.refused = max(self.refused, life.refused)

    def check(self) -> None:
        """Compare the ledger of every tenant with the driver, and that of the group with its members."""
        held = 0
        for life in self.lives:
            if life.ways == "shared":
                life.close_shared()
        eventually(_nothing_outlives, 15, "the release of exited processes' memory")
        for one in self.tenants:
            pools = any(life.ways in ("pools", "shared") for life in self.lives if life.tenant is one)
            agree = one.assert_never_below if self.crowded else one.assert_covered if pools else one.assert_exact
            held += agree(5)
            assert not one.view()["bypassing"]
            self.drift = max(self.drift, *(seen["drift_bytes"] or 0 for seen in one.view()["devices"]))
        assert held >= sum(life.contexts for life in self.lives) * CONTEXT
        eventually(self._whole_is_its_parts, 5, f"the group's bytes equal the sum of its members': {self._whole()}")

    def _whole(self) -> dict[str, Any]:
        return next((t for t in ask(verb="snapshot")["tenants"] if t["path"] == self.place.group), {})

    def _whole_is_its_parts(self) -> bool:
        whole = self._whole()
        if not whole:
            return not self.grouped
        held = {(p["pid"], p["gpu"]): p["bytes"] for p in whole["processes"]}
        ours = {(p["pid"], p["gpu"]): p["bytes"] for one in self.tenants for p in one.view()["processes"]}
        return ours == held and sum(held.values()) == sum(d["used_bytes"] for d in whole["devices"])

    def end(self) -> None:
        """End all lives, and check that nothing is left."""
        for life in self.lives:
            life.close()
        for life in self.lives:
            eventually(lambda life=life: life.pid not in life.tenant.pids(), 20, "the exit of the life")
        eventually(_nothing_outlives, 15, "the release of exited processes' memory")
        for one in self.tenants:
            assert one.assert_exact() == 0, "bytes are charged without a process"


def _nothing_outlives() -> bool:
    return not unnamed_bytes() and not orphans()


def _lost() -> float:
    return metrics()["fgpu_events_lost_total", frozenset({("reason", "full")})]


def _flood(place: Place) -> None:
    """Move a process from one of two cgroups to the other and back, many times.

    The cgroups belong to no workload: the kernel sends only few events of a workload with many events, so such a
    workload never fills the ring.
    """
    beside = cgroup_root() / f"{place.group.lstrip('/')}-flood"
    two = [beside / name for name in ("here", "there")]
    restless = subprocess.Popen(["sleep", "infinity"])
    try:
        for cgroup in two:
            cgroup.mkdir(parents=True)
        begun, moves = time.monotonic(), 0
        while moves < FLOOD_MOVES or time.monotonic() < begun + FLOOD_SECONDS:
            (two[moves % 2] / "cgroup.procs").write_text(str(restless.pid))
            moves += 1
    finally:
        restless.kill()
        restless.wait(30)
        for cgroup in (*two, beside):
            remove_cgroup(cgroup)


@pytest.fixture
def chance() -> random.Random:
    """Return a generator with the seed FGPU_TEST_SEED. Without it, each full run uses a new seed."""
    seed = int(os.environ.get("FGPU_TEST_SEED", new_seed()))
    print(f"FGPU_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def rounds(scale: Callable[[int, int, int], int]) -> Callable[[int, int, int], int]:
    """Return the number of rounds, by the run's scale or FGPU_TEST_ROUNDS."""
    return lambda *counts: int(os.environ.get("FGPU_TEST_ROUNDS", scale(*counts)))


@pytest.fixture
def world(
    service: Service, place: Place, chance: random.Random, scale: Callable[[int, int, int], int]
) -> Iterator[World]:
    """Return three lives in two tenants. Two of them use pools and share memory."""
    world = World(service, place, chance, ("plain", "shared", "shared"), scale(A_FEW, MANY, MOST))
    yield world
    if world.grouped:
        fgpu("unset", place.group)


def live(world: World, rounds: int) -> dict[str, int]:
    """Run this many rounds with checks. Return the number of anomalies of each kind."""
    before = ask(verb="snapshot")["anomalies"]
    for _ in range(rounds):
        world.turn()
        world.check()
        world.happen()
    after = ask(verb="snapshot")["anomalies"]
    print(
        f"{world.operations} operations, {rounds} checks, {world.floods} floods, of pools {world.drift} bytes of drift"
    )
    return {kind: after[kind] - before[kind] for kind in after}


@pytest.mark.timeout(7200)
@pytest.mark.places("cgroups")
def test_random_lives_keep_ledger_and_driver_equal_except_for_the_drift_of_pools(world: World, rounds) -> None:
    many = rounds(5, 12, 1000)
    anomalies = live(world, many)
    assert world.operations == many * 3 * THREADS * world.pace
    assert world.refused > 0
    assert MOVES or world.tenants[0].memory()["peak_bytes"] <= LIMIT + 16 * MIB
    assert {a: anomalies[a] for a in IMPOSSIBLE} == dict.fromkeys(IMPOSSIBLE, 0)
    world.end()


# -- full maps


@pytest.fixture
def small(service: Service, tmp_path: Path) -> Iterator[None]:
    """Run the service with its own BPF programs, whose maps fill up soon."""
    package = tmp_path / "site/fgpu_ebpf"
    shutil.copytree(ROOT / "fgpu_ebpf", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "bpf", package / "bpf")
    shutil.copytree(BUILD / "oci", package / "oci")
    text = (package / "bpf/maps.bpf.h").read_text()
    for name, most in SMALL.items():
        text, n = re.subn(rf"(?m)^#define {name} .*$", f"#define {name} {most}", text)
        assert n == 1, name
    (package / "bpf/maps.bpf.h").write_text(text)
    service.detach()
    service.command = [
        "env",
        "--chdir=/",
        f"PYTHONPATH={package.parent}",
        f"{ROOT}/.venv/bin/python",
        "-m",
        "fgpu_ebpf.cli",
    ]
    try:
        service.start_agent()
        yield
        service.detach()
    finally:
        service.command = FGPU
        service.start_agent()


@pytest.fixture
def crowd(small: None, service: Service, place: Place, chance: random.Random) -> Iterator[World]:
    """Return three lives without memory that NVML hides: a process without an entry is visible only in NVML."""
    world = World(service, place, chance, ("shown", "shown", "shown"), crowded=True)
    yield world
    if world.grouped:
        fgpu("unset", place.group)


@pytest.mark.timeout(7200)
@pytest.mark.places("cgroups")
def test_random_lives_in_full_maps_never_bring_the_ledger_below_the_driver(crowd: World, rounds) -> None:
    anomalies = live(crowd, rounds(3, 10, 100))
    assert anomalies["full"] > 0
    refused = {dict(labels)["reason"]: n for (name, labels), n in metrics().items() if name == REFUSALS}
    assert refused["entries"] > 0
    assert {a: anomalies[a] for a in IMPOSSIBLE if a != "full"} == {"release": 0, "device": 0, "lost": 0}
    crowd.end()
