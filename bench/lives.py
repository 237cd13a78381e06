"""Check on a real GPU, with random programs, that all memory is charged and that none stays charged after its end.

LIVES programs (tests/programs/life.c), each in a tenant, allocate, share and free memory in every way that a real
driver supports, for MINUTES. Some of them are killed. Before each check, all programs close the memory that they share.
Then there must be no orphan. The ledger must have at least the bytes that NVML shows for each tenant's processes, and
over all tenants at least the increase of the device's memory in use, minus the driver's own part.

Prints `lives_NAME VALUE UNIT` and writes build/bench/lives.json. Exits with 1 if a check fails. Starts and stops the
agent. No other program may use the device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from bench.charged import MIB
from bench.lib import nvml
from bench.lib.service import ROOT, BenchError, agent
from bench.lib.tenants import Program, ask, cgroup_root, ending, record

MOST_BYTES = 24 << 30
CONTEXT_REST, DEVICE_REST = 6 * MIB, 32 * MIB  # the driver's own part: in no process's row, measured on one H200
THREADS, OPERATIONS = 2, 200
SETTLED_SECONDS, ROUND_SECONDS = 5.0, 120.0
NAME = "lives-"


class Life(Program):
    """One program. `tenant`: the name of its tenant. `limit`: in bytes. `way`: an argument of tests/programs/life.c."""

    def __init__(self, tenant: str, limit: int, chance: random.Random, way: str) -> None:
        self.tenant = tenant
        command = [str(ROOT / "build/e2e/life"), str(chance.randrange(1 << 30)), str(THREADS), way]
        super().__init__(command, limit, tenant)
        self.pid = int(self.hear().split()[2])

    def finish(self) -> int | None:
        """Wait for the end of a round, and let the program close its shared memory.

        Returns:
            The number of operations, or None if the program exited.
        """
        try:
            done = int(self.hear(ROUND_SECONDS).split()[1])
            self.say("close")
            self.hear(ROUND_SECONDS)
        except BenchError:
            return None
        return done

    def kill(self) -> None:
        """Kill the program with SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        self.end()


def snapshot() -> list[dict[str, Any]]:
    """Return the tenants of this benchmark, including tenants whose cgroup is gone."""
    return [t for t in ask(verb="snapshot")["tenants"] if t["tenant"].startswith(NAME)]


def shown(tenant: str) -> int:
    """Return the bytes that NVML shows for a tenant's processes; 0 if its cgroup is gone."""
    with contextlib.suppress(FileNotFoundError):
        return nvml.bytes_of(nvml.pids_of(cgroup_root() / "fgpu" / tenant))
    return 0


@dataclass(slots=True)
class Run:
    """The counts and the results of a run."""

    before: int
    operations: int = 0
    checks: int = 0
    kills: int = 0
    crashed: int = 0
    drift: int = 0
    settled: float = 0.0

    def wrong(self, contexts: int) -> str:
        """Return the first error, or an empty text. `contexts`: the number of contexts on the device."""
        tenants = snapshot()
        if any(t["orphans"] for t in tenants):
            return f"orphaned: {[(t['tenant'], t['orphans']) for t in tenants]}"
        used = {t["tenant"]: int(t["devices"][0]["used_bytes"]) for t in tenants}
        for tenant, bytes_ in used.items():
            rows = shown(tenant)
            if bytes_ < rows:
                return f"{tenant} has {rows} bytes by NVML and is charged {bytes_}"
        beyond = nvml.bytes_in_use() - self.before - sum(used.values()) - contexts * CONTEXT_REST - DEVICE_REST
        if beyond > 0:
            return f"{beyond} bytes in use are charged to no tenant"
        drifts = [t["devices"][0]["drift_bytes"] for t in tenants]
        self.drift = max([self.drift, *(drift for drift in drifts if drift is not None)])
        return ""

    def check(self, contexts: int) -> None:
        """Call wrong() until there is no error. Raises BenchError: there is still one after SETTLED_SECONDS."""
        self.checks += 1
        self.settled = max(self.settled, _until_right(lambda: self.wrong(contexts)))


def _until_right(look: Callable[[], str]) -> float:
    begun = time.monotonic()
    while wrong := look():
        if time.monotonic() - begun > SETTLED_SECONDS:
            raise BenchError(wrong)
        time.sleep(0.02)
    return time.monotonic() - begun


def live(minutes: float, lives: int, seed: int, way: str) -> Run:
    """Run all rounds and return the counts. Raises BenchError if a check failed."""
    chance, run = random.Random(seed), Run(nvml.bytes_in_use())
    limit = min(MOST_BYTES, nvml.bytes_in_all() * 9 // 10 // lives)
    with ending() as programs:
        all_: list[Life] = []

        def begin(tenant: str) -> None:
            all_.append(Life(tenant, limit, chance, way))
            programs.append(all_[-1])

        for number in range(lives):
            begin(f"{NAME}{number}")
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            for life in all_:
                life.say(str(OPERATIONS))
            if chance.randrange(2):
                time.sleep(chance.random() * 0.2)
                victim = all_.pop(chance.randrange(len(all_)))
                victim.kill()
                run.kills += 1
                begin(victim.tenant)
                all_[-1].say(str(OPERATIONS))
            for life in list(all_):
                if (done := life.finish()) is None:  # the program crashed in the driver
                    all_.remove(life)
                    life.end()
                    run.crashed += 1
                    begin(life.tenant)
                else:
                    run.operations += done
            run.check(THREADS * lives)
    run.check(0)
    return run


def main() -> int:
    """Read the command line, run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--lives", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--way", default="real", help="of tests/programs/life.c")
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    given = parser.parse_args()
    print(f"lives_seed {given.seed} ", flush=True)
    try:
        pynvml.nvmlInit()
        with agent(["--driver-root", given.driver_root, "--shim", str(given.shim)]):
            run = live(given.minutes, given.lives, given.seed, given.way)
    except (BenchError, OSError, subprocess.SubprocessError, pynvml.NVMLError) as error:
        print(f"bench lives: {error}", file=sys.stderr)
        return 1
    record(
        "lives",
        {
            "lives_operations": (run.operations, ""),
            "lives_checks": (run.checks, ""),
            "lives_killed": (run.kills, ""),
            "lives_crashed": (run.crashed, ""),
            "lives_pool_drift": (run.drift, "bytes"),
            "lives_settled_longest": (run.settled, "s"),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
