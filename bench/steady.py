"""Measure the cost of a limit for a running program: stream-ordered allocations in a loop, and a torch training.

Prints medians: `steady_pair_WHICH VALUE us`, the time of an allocation and its free, and `steady_train_WHICH VALUE
steps/s`. WHICH is native (no shim) or managed (a tenant of `fgpu run`). There are 10^5 pairs, through libcudart or, if
there is none, through the driver (`steady_pair_way`). Then prints the figures with a bar: `steady_pair_added`, the
median of the differences between a managed batch of pairs and the native batch before it, and `steady_train_ratio`.
Trainings run native, managed, managed, native. During native trainings there is no agent.

Writes build/bench/steady.json. Exits with 1 if a bar is missed. Starts and stops the agent. TORCH_PYTHON is a Python
interpreter with torch (default: python3). If there is no torch, `steady_train absent` is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from bench.lib.cudart import libcudart
from bench.lib.service import ROOT, BenchError, agent, on_one_processor
from bench.lib.tenants import Program, ending, record

ADDED_US, RATIO_PERCENT = 0.1, 99.0
LIMIT = 16 << 30
WARM_BATCHES, BATCHES, PAIRS = 5, 100, 1000
PYTHON = os.environ.get("TORCH_PYTHON", "python3")
Found = dict[str, list[float]]


def pairs(given: argparse.Namespace, found: Found) -> str:
    """Run batches inside and outside of a tenant, in turn and on one processor, and add their times to `found`.

    Returns:
        The way in which the programs allocate: runtime or driver.
    """
    with ending() as programs:
        command = on_one_processor([str(given.program), *([given.runtime] if given.runtime else [])])
        which = {"native": Program(command), "managed": Program(command, given.limit, "steady-pairs")}
        programs += which.values()
        ways = {program.hear() for program in programs}
        if len(ways) != 1 or not (way := ways.pop()).startswith("ready "):
            raise BenchError(f"pairs: {ways}")
        for batch in range(-WARM_BATCHES, BATCHES):
            for name, program in which.items():
                program.say(f"loop 1 {PAIRS}")
                said = program.hear()
                if said.startswith("-"):
                    raise BenchError(f"pairs, {name}: {said}")
                if batch >= 0:
                    found.setdefault(name, []).append(int(said) / PAIRS / 1000)
    return way.partition(" ")[2]


def steps_per_second(given: argparse.Namespace, limit: int | None) -> float | None:
    """Return the median speed of several trainings in one process; None: there is no torch."""
    with ending() as programs:
        programs.append(Program([PYTHON, str(ROOT / "bench/lib/train.py")], limit, "steady-train"))
        found = []
        for _ in range(given.trainings):
            programs[0].say(str(given.steps))
            said = json.loads(programs[0].hear())
            if "absent" in said:
                return None
            found.append(float(said["steps_per_second"]))
        return statistics.median(found)


def measure(given: argparse.Namespace) -> tuple[str, Found, Found]:
    """Measure everything.

    Returns:
        The way in which pairs allocated, the microseconds of a pair in each batch, and the steps a second of trainings.
    """
    way, pair, train = "", Found(), Found()

    def training(which: str, limit: int | None) -> None:
        steps = steps_per_second(given, limit)
        if steps is not None:
            train.setdefault(which, []).append(steps)

    for _ in range(given.rounds):
        training("native", None)
        with agent(["--driver-root", given.driver_root, "--shim", str(given.shim)]):
            way = way or pairs(given, pair)
            training("managed", given.limit)
            training("managed", given.limit)
        training("native", None)
    return way, pair, train


def report(way: str, pair: Found, train: Found) -> int:
    """Print all figures. Return 1 if a bar is missed."""
    lines: dict[str, tuple[float, str]] = {f"steady_pair_{w}": (statistics.median(us), "us") for w, us in pair.items()}
    added = statistics.median(m - n for n, m in zip(pair["native"], pair["managed"], strict=True))
    lines["steady_pair_added"] = (added, "us")
    held = [added <= ADDED_US]
    print(f"steady_pair_way {way}")
    if train:
        lines |= {f"steady_train_{w}": (statistics.median(steps), "steps/s") for w, steps in train.items()}
        ratio = 100 * statistics.median(m / n for n, m in zip(train["native"], train["managed"], strict=True))
        lines["steady_train_ratio"] = (ratio, "%")
        held.append(ratio >= RATIO_PERCENT)
    else:
        print("steady_train absent")
    lines["steady_bars_held"] = (sum(held), f"of {len(held)}")
    record("steady", lines)
    return 0 if all(held) else 1


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="each is native, managed, managed, native")
    parser.add_argument("--steps", type=int, default=300, help="of a training")
    parser.add_argument("--trainings", type=int, default=3, help="in one process")
    parser.add_argument("--limit", type=int, default=LIMIT, help="bytes")
    parser.add_argument("--runtime", help="the CUDA runtime's library, if not the one that is found")
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    parser.add_argument("--program", type=Path, default=ROOT / "build/bench/pairs")
    given = parser.parse_args()
    given.runtime = given.runtime or libcudart(PYTHON, given.driver_root)
    try:
        way, pair, train = measure(given)
    except (BenchError, OSError, ValueError) as error:
        print(f"bench steady: {error}", file=sys.stderr)
        return 1
    return report(way, pair, train)


if __name__ == "__main__":
    sys.exit(main())
