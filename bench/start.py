"""Measure how long `fgpu agent` takes from its start to enforcing, and each part of the start.

Prints `start_WHICH VALUE s`, and `start_WHICH_PART VALUE s`, the time at which each part was done, from the same
beginning. All values are medians of --rounds starts. WHICH is `first` (nothing is pinned: the agent compiles the BPF
programs, and measures the size of a context if that of this driver is not known) or `restart` (agent and gatekeeper
were killed). `first_many` and `restart_many` are the same with --tenants cgroups that one policy matches, with a
process in each. Writes build/bench/start.json. Exits with 1 if a bar is missed. Starts and stops the agent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.lib.service import FGPU, READY_SECONDS, ROOT, BenchError, end_in_order
from bench.lib.tenants import RUN, ask, cgroup_root, record

LISTEN = "127.0.0.1:19425"
BARS = {"first": 3.0, "restart": 0.8, "first_many": 3.0, "restart_many": 3.0}
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: start}
spec:
  selector: {cgroup: ["fgpu-start/*"]}
  memory: {limit: 8MiB}
"""
Parts = dict[str, float]


def start(options: list[str]) -> tuple[subprocess.Popen[bytes], Parts]:
    """Start an agent and wait until it enforces limits.

    Returns:
        The process, and the seconds until each part of the start was done. The key "" is the whole start.
    """
    with tempfile.TemporaryFile("w+") as log:
        begun = time.monotonic()
        agent = subprocess.Popen([*FGPU, "agent", *options], stdout=log, stderr=log)
        while time.monotonic() < begun + READY_SECONDS:
            log.seek(0)
            text = log.read()
            if said := re.search(r"ready after [\d.]+ s: (.*)", text):
                parts = dict(part.rsplit(" ", 1) for part in said[1].split(", "))
                return agent, {"": time.monotonic() - begun} | {name: float(at) for name, at in parts.items()}
            if agent.poll() is not None:
                raise BenchError(f"the agent did not start: {text.strip()}")
            time.sleep(0.005)
        agent.kill()
        raise BenchError(f"the agent does not enforce limits within {READY_SECONDS} s")


def both(options: list[str], tenants: int) -> dict[str, Parts]:
    """Start the agent, kill agent and gatekeeper, and start the agent again. Return the times of both starts.

    Raises BenchError if a tenant is missing after a start.
    """
    found: dict[str, Parts] = {}
    agent, found["first"] = start(options)
    try:
        in_force(tenants)
        os.kill(int((RUN / "gatekeeper.lock").read_text()), signal.SIGKILL)
        agent.kill()
        agent.wait()
        agent, found["restart"] = start(options)
        in_force(tenants)
    finally:
        subprocess.run([*FGPU, "detach"], check=False, capture_output=True, timeout=30)
        agent.terminate()
        agent.wait(10)
    return found


def in_force(tenants: int) -> None:
    """Check the number of tenants. Raises BenchError if there are more or fewer."""
    there = len(ask(verb="snapshot")["tenants"])
    if there != tenants:
        raise BenchError(f"{there} tenants of {tenants} are in force")


@contextlib.contextmanager
def busy_cgroups(count: int) -> Iterator[None]:
    """Make `count` cgroups inside a common cgroup, with a process in each."""
    parent = cgroup_root() / "fgpu-start"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            folder = parent / f"t{number}"
            folder.mkdir(parents=True)
            enter = f"echo $$ >{folder}/cgroup.procs && exec sleep 1000"
            processes.append(subprocess.Popen(["sh", "-c", enter], stdout=subprocess.DEVNULL))
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number in range(len(processes)):
            (parent / f"t{number}").rmdir()
        if parent.exists():
            parent.rmdir()


def measure(rounds: int, tenants: int, options: list[str]) -> dict[str, list[Parts]]:
    """Measure `rounds` starts of each kind, without and with tenants. Return their times in seconds by name."""
    found: dict[str, list[Parts]] = {}
    for _ in range(rounds):
        for which, parts in both(options, 0).items():
            found.setdefault(which, []).append(parts)
    with busy_cgroups(tenants):
        for _ in range(rounds if tenants else 0):
            for which, parts in both(options, tenants).items():
                found.setdefault(f"{which}_many", []).append(parts)
    return found


def report(found: dict[str, list[Parts]]) -> int:
    """Print the medians, then the targets that were missed. Return 1 if a target was missed, else 0."""
    lines: dict[str, tuple[float, str]] = {}
    for which, starts in found.items():
        for part in starts[0]:
            seconds = statistics.median(parts[part] for parts in starts)
            name = f"start_{which}" + (f"_{part.replace(' ', '_')}" if part else "")
            lines[name] = (seconds, "s")
    record("start", lines)
    missed = [which for which in found if lines[f"start_{which}"][0] > BARS[which]]
    for which in missed:
        print(f"start_{which}: bar {BARS[which]:g} s MISSED")
    print(f"start_bars_held {len(found) - len(missed)} of {len(found)}")
    return 1 if missed else 0


def main() -> int:
    """Read the command line, measure and print. Return 0 if every bar is held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", default=str(ROOT / "build/shim/libfgpu.so"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tenants", type=int, default=1000)
    given = parser.parse_args()
    end_in_order()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        Path(folder, "start.yaml").write_text(POLICY, encoding="utf-8")
        options = ["--driver-root", given.driver_root, "--shim", given.shim, "--listen", LISTEN, "--policies", folder]
        try:
            return report(measure(given.rounds, given.tenants, options))
        except (BenchError, OSError) as error:
            print(f"bench start: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
