"""Measure how long a new cgroup has no limit, and how much memory a program gets during this time.

No engine, hook or command announces the cgroup to the agent. A policy selects it by its path, and the agent discovers
it. Each time is measured from mkdir(2) to the limit on the usage page, on a host with 200 other tenants: for a single
cgroup (`alone`, --rounds times), and for the last of 50 cgroups that are made in immediate succession (`burst`).
Prints `in_force`: median, 99th percentile and maximum.

Then 20 programs each start immediately in a new cgroup, and allocate until they are refused. Prints
`first_program_beyond`, the bytes beyond the limit, and `first_program_unwitnessed`. Writes build/bench/discovery.json.
Exits with 1 if a single cgroup had no limit for more than 100 ms, or if one of the figures of programs is not 0. Starts
and stops the agent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.lib.service import ROOT, BenchError, agent
from bench.lib.tenants import ask, cgroup_root, record
from tests.support.kernel import limit_in_force

BAR_MS, PATIENCE_SECONDS = 100.0, 20.0
LIVE, BURST, BURSTS, PROGRAMS = 200, 50, 11, 20
LIMIT = 1 << 30
SHIM = ROOT / "build/shim/libfgpu.so"
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: discovery}
spec:
  selector: {cgroup: ["fgpu-bench-discovery/*"]}
  memory: {limit: 1GiB}
"""


def until(look: Callable[[], object], what: str) -> None:
    """Call a function until it returns a true value. Raises BenchError after PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not look():
        if time.monotonic() > deadline:
            raise BenchError(f"not within {PATIENCE_SECONDS} s: {what}")
        time.sleep(0.0002)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Make a cgroup in which every child cgroup is a tenant."""
    parent = cgroup_root() / "fgpu-bench-discovery"
    parent.mkdir()
    try:
        yield parent
    finally:
        subprocess.run(["find", parent, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"], check=False)


def in_force_ms(parent: Path, count: int) -> float:
    """Make `count` cgroups, then remove them. Return the time from the first mkdir until all have their limits."""
    begun = time.perf_counter()
    made = [parent / f"new-{number}" for number in range(count)]
    for cgroup in made:
        cgroup.mkdir()
    numbers = [cgroup.stat().st_ino for cgroup in made]
    until(lambda: all(limit_in_force(number) == LIMIT for number in reversed(numbers)), "limits in force")
    took = (time.perf_counter() - begun) * 1e3
    for cgroup in made:
        cgroup.rmdir()
    until(lambda: all(limit_in_force(number) is None for number in numbers), "the limits are removed")
    return took


def lines_of(name: str, took: list[float]) -> dict[str, tuple[float, str]]:
    """Return median, 99th percentile and maximum of `took` (milliseconds), by figure's name, each with its unit."""
    p99 = statistics.quantiles(took, n=100, method="inclusive")[98]
    found = {"p50": statistics.median(took), "p99": p99, "max": max(took)}
    return {f"{name}_in_force_{which}": (ms, "ms") for which, ms in found.items()}


def first_program(parent: Path, number: int, environment: dict[str, str]) -> tuple[int, int]:
    """Start a program in a new cgroup. Return its bytes beyond the limit, and its unwitnessed bytes."""
    cgroup = parent / f"program-{number}"
    fill = f'mkdir "$1" && echo $$ >"$1/cgroup.procs" && exec {ROOT}/build/examples/fill --step 2MiB'
    command = ["sh", "-c", fill, "sh", cgroup]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    if "OUT_OF_MEMORY" not in done.stdout:
        raise BenchError(f"{cgroup.name}: {done.stdout}{done.stderr}")
    (seen,) = [t["devices"][0] for t in ask(verb="snapshot")["tenants"] if t["path"].endswith(f"/{cgroup.name}")]
    until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text(), "an empty cgroup")
    cgroup.rmdir()
    given = int(done.stdout.split("admitted ")[1].split()[0])
    return max(0, seen["peak_bytes"] - LIMIT), given - seen["witnessed_bytes"]


def measure(parent: Path, rounds: int, driver_root: str) -> dict[str, tuple[float, str]]:
    """Return all figures by name, each with its unit, measured while LIVE other tenants exist."""
    for number in range(LIVE):
        (parent / f"old-{number}").mkdir()
    until(lambda: len(ask(verb="snapshot")["tenants"]) >= LIVE, "the other tenants exist")
    lines = lines_of("alone", [in_force_ms(parent, 1) for _ in range(rounds)])
    lines |= lines_of("burst", [in_force_ms(parent, BURST) for _ in range(BURSTS)])
    environment = {**os.environ, "LD_PRELOAD": str(SHIM)}
    if driver_root != "/":
        environment["LD_LIBRARY_PATH"] = f"{driver_root}/lib"
    beyond, unwitnessed = zip(*(first_program(parent, n, environment) for n in range(PROGRAMS)), strict=True)
    return lines | {
        "first_program_beyond": (max(beyond), "bytes"),
        "first_program_unwitnessed": (max(unwitnessed), "bytes"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--rounds", type=int, default=211)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, folder() as parent:
        work = Path(name)
        (work / "agent.yaml").write_text(f"cdiFolder: {work}/cdi\novercommit: allow\n")
        (work / "policy.d").mkdir()
        (work / "policy.d/discovery.yaml").write_text(POLICY)
        words = ["--driver-root", options.driver_root, "--listen", "127.0.0.1:0", "--shim", str(SHIM)]
        words += ["--config", str(work / "agent.yaml"), "--policies", str(work / "policy.d")]
        try:
            with agent(words):
                lines = measure(parent, options.rounds, options.driver_root)
        except BenchError as error:
            print(error, file=sys.stderr)
            return 1
    record("discovery", lines)
    got = lines["first_program_beyond"][0] or lines["first_program_unwitnessed"][0]
    return int(lines["alone_in_force_max"][0] > BAR_MS or got != 0)


if __name__ == "__main__":
    sys.exit(main())
