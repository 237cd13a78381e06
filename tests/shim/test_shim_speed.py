"""What the shim adds to calls that take the driver half a microsecond. The stand-in takes next to nothing."""

import subprocess

import pytest
from shim_kit import DEADLINE, Agent, Build

MIB = 1 << 20


def figures(text: str) -> list[float]:
    return [float(n) for n in text.split()]


@pytest.mark.parametrize("size", [4096, 4 * MIB, 100 * MIB])
@pytest.mark.parametrize("more", [(), ("wait",), ("wait", "graph")], ids=["pools", "waits", "graphs"])
def test_little_is_added(build: Build, held: Agent, size: int, more: tuple[str, ...]) -> None:
    """A pair stays below 0.1 us with room for a busy machine: a measure or a question alone would be more."""
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
