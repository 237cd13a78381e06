"""The time that the shim adds to calls that take a real driver half a microsecond, and the stand-in almost no time."""

import subprocess

import pytest

from tests.shim.gate_kit import unlock
from tests.shim.shim_kit import DEADLINE, Agent, Build

MIB = 1 << 20


def figures(text: str) -> list[float]:
    return [float(n) for n in text.split()]


@pytest.mark.parametrize("size", [4096, 4 * MIB, 100 * MIB])
@pytest.mark.parametrize("more", [(), ("wait",), ("wait", "graph")], ids=["pools", "waits", "graphs"])
def test_the_shim_adds_less_than_a_tenth_of_a_microsecond_to_a_call(
    build: Build, held: Agent, size: int, more: tuple[str, ...]
) -> None:
    """A measurement or a request would take more than this 0.1 us, which holds on a busy machine too."""
    program = build.compile("speed.c", "speed", f"-L{build.folder / 'driver'}", "-l:libcuda.so.1")
    command = [program, size, *more]
    environment = {"LD_LIBRARY_PATH": str(build.folder / "driver")}
    for _ in range(3):
        bare = subprocess.run(map(str, command), capture_output=True, text=True, env=environment, timeout=DEADLINE)
        with_shim = held.run(*command)[0]
        added = [b - a for a, b in zip(figures(bare.stdout), figures(with_shim), strict=True)]
        print(f"{size} {more}: pair, launch, wait {bare.stdout.strip()} -> {with_shim.strip()}")
        if max(added) < 100:
            return
    raise AssertionError(added)


def test_a_launch_at_an_open_gate_reads_the_clock_about_once(build: Build, held: Agent) -> None:
    """A wait reads the clock four times at most. Neither a launch nor a wait changes the capture mode."""
    unlock(held, 1)
    program = build.compile("gated.c", "gated", f"-L{build.folder / 'driver'}", "-l:libcuda.so.1", "-rdynamic", "-ldl")
    launch_ns, wait_ns, clocks, clocks_waiting, exchanges = figures(held.run(program)[0])
    print(f"a launch {launch_ns} ns, a wait {wait_ns} ns")
    assert 0 < launch_ns < 1000
    assert 0 < clocks <= 1.2  # sometimes it checks for another gatekeeper
    assert clocks_waiting <= 4
    assert exchanges == 0
