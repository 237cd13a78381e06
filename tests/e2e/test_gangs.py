"""Tenants on several devices get all of their devices at once or none, because their kernels wait for each other.

The tests need a driver with two devices and their own agent, so they run themselves in a separate mount namespace.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, metrics
from tests.support.host import BUILD, ENVIRONMENT, FGPU, GIB, GPUS, ROOT
from tests.support.service import run_on_devices
from tests.support.wait import eventually

pytestmark = pytest.mark.timed

inside = pytest.mark.skipif(GPUS == "1", reason="is run by test_the_file_s_tests_pass_on_two_devices")
SECONDS, KERNEL_US, HEAD_START_NS = 3, 1000, 100_000_000


@pytest.mark.skipif(GPUS != "1", reason="this run has these devices already")
def test_the_file_s_tests_pass_on_two_devices() -> None:
    run_on_devices(__file__)


class Pairs:
    """The program bench/programs/meet.c in a tenant, or without a gate.

    It launches pairs of kernels on devices 0 and 1 that wait for each other.
    """

    def __init__(self, program: Path, key: int, name: str = "") -> None:
        run = [*FGPU, "run", "--memory", f"{GIB}B", "--weight", "100", "--name", name, "--"] if name else []
        pipe = subprocess.PIPE
        self.name, self.command = name, [*run, program, str(key)]
        self.process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=ENVIRONMENT, start_new_session=True
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def begin(self, start_ns: int, seconds: float = SECONDS) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{seconds} 0 {start_ns} {KERNEL_US} pairs\n")

    def done(self) -> float:
        assert self.process.stdout
        return float(self.process.stdout.readline().split()[4])

    def turns(self) -> list[float]:
        """Return the number of turns that the tenant has had on each device."""
        (tenant,) = [t for t in ask(verb="snapshot")["tenants"] if t["tenant"] == self.name]
        assert tenant["enforcement"] == "kernel"
        return [device["compute"]["waits"] for device in sorted(tenant["devices"], key=lambda d: d["gpu"])]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def meet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the benchmark's program."""
    source, out = ROOT / "bench/programs/meet.c", tmp_path_factory.mktemp("meet") / "meet"
    subprocess.run(
        ["gcc", "-std=gnu11", "-O2", f"-I{BUILD}/headers", "-o", out, source, "-ldl"], check=True, timeout=60
    )
    return out


@pytest.fixture
def start(meet: Path, unharmed: None) -> Iterator[Callable[..., Pairs]]:
    started: list[Pairs] = []

    def make(name: str = "") -> Pairs:
        started.append(Pairs(meet, 100 + len(started), name))
        return started[-1]

    yield make
    for one in started:
        one.close()


def together(*programs: Pairs, seconds: float = SECONDS) -> list[float]:
    start_ns = time.monotonic_ns() + HEAD_START_NS
    for program in programs:
        program.begin(start_ns, seconds)
    return [program.done() for program in programs]


@inside
def test_gangs_take_turns_on_all_their_devices(start: Callable[..., Pairs]) -> None:
    solo, first, second = start(), start("gang-1"), start("gang-2")
    (alone,) = together(solo)
    assert alone > 0.5 * SECONDS * 1e6 / KERNEL_US
    done = together(first, second)
    for gang in (first, second):
        eventually(lambda: gang.turns()[0] == gang.turns()[1] > 10, 3, "the same number of turns on both devices")  # noqa: B023
    assert min(done) > 0.4 * sum(done)
    assert sum(done) > 0.6 * alone  # a turn may end between two matching launches; the missing ones may still proceed


@inside
def test_a_neighbour_on_one_device_of_a_gang_gets_its_part_of_that_device(
    start: Callable[..., Pairs], tmp_path: Path
) -> None:
    """The neighbour gets its part of device 0. The gang gets the rest, although device 1 has no other tenant."""
    spin = tmp_path / "spin"
    flags = ["-std=gnu11", "-O2", f"-I{BUILD}/headers"]
    subprocess.run(["gcc", *flags, "-o", spin, ROOT / "bench/programs/spin.c", "-ldl"], check=True, timeout=60)
    gang, alone = start("gang-1"), start()
    (free,) = together(alone)
    command = [*FGPU, "run", "--memory", f"{GIB}B", "--weight", "100", "--name", "single", "--", spin]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=ENVIRONMENT) as single:
        assert single.stdin
        assert single.stdout
        assert single.stdout.readline() == "ready\n"
        start_ns = time.monotonic_ns() + HEAD_START_NS
        gang.begin(start_ns)
        single.stdin.write(f"{SECONDS} 0 {start_ns} 200 burst\n")
        pairs, kernels = gang.done(), float(single.stdout.readline().split()[4])
        single.stdin.close()
    shares = pairs / free, kernels * 200 / (SECONDS * 1e6)
    assert shares[0] < 0.65
    assert 0.3 * sum(shares) < shares[1] < 0.7 * sum(shares), shares


@inside
def test_a_killed_gang_releases_both_devices(start: Callable[..., Pairs]) -> None:
    first, second = start("gang-1"), start("gang-2")
    start_ns = time.monotonic_ns() + HEAD_START_NS
    first.begin(start_ns, 60)
    second.begin(start_ns)
    eventually(lambda: min(first.turns() + second.turns()) > 0, 5, "turns")
    first.close()
    assert second.done() > 0.3 * SECONDS * 1e6 / KERNEL_US
    switches = [metrics()["fgpu_slice_switches_total", frozenset({("gpu", gpu)})] for gpu in "01"]
    assert min(switches) > 0
