"""Measure the time that fgpu adds to a program's calls, in turn without fgpu on the host and in a tenant.

Prints `NAME_pNN_WHICH VALUE us`. WHICH is native (no agent, no probe, no shim), managed (a tenant of `fgpu run`) or
added (the difference). Each value is that of the fastest of several processes on one processor, because on shared
machines all calls of one process may take 50 % longer than all calls of the next process. Writes the same values to
build/bench/memory.json. Starts and stops the agent, so no agent may be running. $FGPU is the command `fgpu`, if set.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

from bench.lib.service import FGPU, ROOT, BenchError, agent, on_one_processor, percentile

# (the call, the number of calls in a process, its name in the output)
CALLS = (
    ("alloc", 1000, "alloc_4MiB"),
    ("free", 1000, "free_4MiB"),
    ("async", 2000, "alloc_async_and_free_4MiB"),
    ("info", 2000, "mem_get_info"),
    ("launch", 2000, "launch"),
    ("init", 7, "init"),
)
PROCESSES = 3  # the number of processes of each kind in a round
Samples = dict[str, list[list[float]]]  # for each call, the times in each process, in microseconds


def measure(command: list[str]) -> dict[str, list[float]]:
    """Run one process that makes every call. Return the times of each call in microseconds."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        first = process.stdout.readline().strip()
        if first != "ready":
            raise BenchError(f"{command[-1]}: {first or 'ended'}")
        found: dict[str, list[float]] = {}
        for call, count, _ in CALLS:
            process.stdin.write(f"{call} {count}\n")
            process.stdin.flush()
            said = process.stdout.readline().split()
            if not said or said[0] == "-":
                print(f"# {call}: not measured: {' '.join(said[1:]) or 'it ended'}", file=sys.stderr)
            else:
                found[call] = [int(ns) / 1000 for ns in said]
        process.stdin.close()
    return found


def table(samples: dict[str, Samples]) -> dict[str, float]:
    """Return the figures by name, in microseconds."""
    lines = {}
    for call, _, name in CALLS:
        if not samples["native"].get(call) or not samples["managed"].get(call):
            continue
        for percent in (50, 99):
            native, managed = (
                min(percentile(times, percent) for times in samples[which][call]) for which in ("native", "managed")
            )
            lines[f"{name}_p{percent}_native"] = native
            lines[f"{name}_p{percent}_managed"] = managed
            lines[f"{name}_p{percent}_added"] = managed - native
    return lines


def run(rounds: int, memory: str, options: list[str], program: Path) -> tuple[dict[str, float], list[float]]:
    """Run native and managed processes in turn, `rounds` times.

    Returns:
        The figures of table(), and the seconds that each start of the agent took.
    """
    samples: dict[str, Samples] = {"native": {}, "managed": {}}
    starts: list[float] = []
    command = on_one_processor([str(program)])
    for _ in range(rounds):
        collect(samples["native"], command)
        with agent(options) as seconds:
            starts.append(seconds)
            collect(samples["managed"], [*FGPU, "run", "--memory", memory, "--", *command])
    return table(samples), starts


def collect(samples: Samples, command: list[str]) -> None:
    """Run PROCESSES processes, one after the other, and add their times to `samples`."""
    for _ in range(PROCESSES):
        for call, times in measure(command).items():
            samples.setdefault(call, []).append(times)


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="4GiB", help="the tenant's limit")
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    parser.add_argument("--program", type=Path, default=ROOT / "build/bench/memory")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench/memory.json")
    given = parser.parse_args()
    options = ["--driver-root", given.driver_root, "--shim", str(given.shim)]
    try:
        if subprocess.run([*FGPU, "status"], check=False, capture_output=True, timeout=30).returncode == 0:
            raise BenchError("an agent runs on this host: stop it, since native means without it")
        lines, starts = run(given.rounds, given.memory, options, given.program)
    except (BenchError, OSError) as error:
        print(f"bench memory: {error}", file=sys.stderr)
        return 1
    for name, value in lines.items():
        print(f"{name} {value:.2f} us")
    print(f"start_to_enforcing {max(starts):.2f} s")
    record = {"us": lines, "start_to_enforcing_s": starts, "rounds": given.rounds, "kernel": platform.release()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if lines else 1


if __name__ == "__main__":
    sys.exit(main())
