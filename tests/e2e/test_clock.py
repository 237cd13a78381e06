"""F8: jumps of the wall clock affect no decision that depends on time.

Only the programs under test get the changed time: agent, gatekeeper and tenants preload a library that changes the time
they read. The kernel's own timers use the monotonic clock, and tests/unit/test_clocks.py checks that fgpu's sources do
too.
"""

from __future__ import annotations

import random
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, fgpu, metrics
from tests.support.host import CONTEXT, FGPU, MIB, REFUSED, ROOT, RUN_DIR
from tests.support.service import Service
from tests.support.wait import eventually

HOUR, YEAR = 3600, 31_557_600
LIMIT = 3 * CONTEXT + 60 * MIB
STEP = 2 * MIB


class Clock:
    """The wall clock of programs that preload the library."""

    def __init__(self, work: Path) -> None:
        self._file, self._library = work / "ahead", work / "clock.so"
        self.ahead = 0
        self.set(0)
        source = Path(__file__).parent / "preloads/clock.c"
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, "-o", self._library, source, "-ldl"], check=True, timeout=60)

    def set(self, seconds: int) -> None:
        """Set how many seconds the clock is ahead of the machine's."""
        self.ahead = seconds
        if not self._file.exists():
            self._file.write_bytes(bytes(8))
        with open(self._file, "r+b") as file:
            file.write(struct.pack("q", seconds))

    def words(self) -> list[str]:
        """Return the start of a command line that runs a program with this clock."""
        return ["env", f"LD_PRELOAD={self._library}", f"FGPU_TEST_CLOCK={self._file}"]


@pytest.fixture
def clock(service: Service, unharmed: None, tmp_path: Path) -> Iterator[Clock]:
    """Restart agent and gatekeeper with this clock, and start the usual ones afterwards."""
    clock = Clock(tmp_path)
    tmp_path.chmod(0o755)
    service.kill_agent()
    service.kill_gatekeeper()
    with open(service.log, "ab") as log:
        command = [*clock.words(), ROOT / ".venv/bin/python", "-m", "fgpu_ebpf.gatekeeper", "--run-dir", RUN_DIR]
        gatekeeper = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
    service.command = [*clock.words(), *FGPU]
    try:
        service.start_agent()
        yield clock
    finally:
        service.command = FGPU
        service.kill_agent()
        if service.gatekeepers():
            service.kill_gatekeeper()
        gatekeeper.wait(10)
        service.start_agent()


def age() -> float:
    """Return the seconds since NVML answered, as the metrics show them."""
    return metrics()["fgpu_reconcile_age_seconds", frozenset({("gpu", "0")})]


@pytest.mark.places("host")
def test_jumps_of_the_wall_clock_do_not_affect_agent_or_programs(
    service: Service, clock: Clock, tenant, scale: Callable[[int, int, int], int]
) -> None:
    one, chance = tenant(LIMIT), random.Random(8)
    before = " ".join(clock.words())
    client = one.client(before=before)
    client.ok("context")
    busy = one.client(before=before)
    busy.ok("context")
    busy.send(f"ask {STEP} 0")
    one.assert_enforced()
    for number in range(scale(20, 100, 1000)):
        clock.set(chance.choice([-1, 1]) * chance.choice([1, 60, HOUR, YEAR]))
        (taken,) = client.ok(f"alloc {20 * MIB}")
        assert client.do(f"alloc {CONTEXT + 100 * MIB}") == REFUSED
        client.ok(f"free {taken}")
        if number % 10 == 0:
            limit = LIMIT + number % 20 * STEP
            fgpu("set", one.path, "--memory", f"{limit}B")
            assert client.ok("info")[1] == limit
            shown = ask(verb="snapshot")["time_seconds"]
            assert abs(shown - time.time() - clock.ahead) < 10, "the agent reads an unchanged clock"
            eventually(lambda: 0 <= age() < 3, 5, "an answer of NVML")
    clock.set(-YEAR)
    eventually(lambda: 0 <= age() < 3, 5, "an answer of NVML")
    service.kill_gatekeeper()
    eventually(service.gatekeepers, 5, "another gatekeeper")
    late = one.client(before=before)
    assert late.do("info").startswith("ok")
    busy.send("context")
    got, refused, other = busy.numbers(busy.receive())
    assert busy.receive() == "ok"
    assert got
    assert (refused, other) == (0, 0), "a request that fits was not admitted"
    late.kill()
    eventually(lambda: late.pid not in one.pids(), 5, "the exit of the program")
    assert one.assert_exact() == 2 * CONTEXT
