"""Shares of two to four torch programs in windows of 2 s: trainings, inference, decoding of a language model.

Prints for each case: the share of the tenant with the highest weight, the largest error of a share in a window after
the first in points, the sum of what each program did as a fraction of itself alone (steps that are mostly Python take
80 to 140 us, by the process), the gatekeeper's processor time, and the steps in each window. For each kind of program:
what a tenant does alone as a fraction of a program that has no tenant, and the sum of two programs without tenants.
Writes build/bench/windows.json. Needs a real GPU; TORCH_PYTHON is an interpreter that has torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time

from bench.lib.service import ROOT, BenchError, agent, end_in_order
from bench.lib.tenants import Program, ask, cpu_ms, ending, record, service_pids
from bench.lib.windows_work import WINDOW_SECONDS

LISTEN = "127.0.0.1:19425"
LIMIT = 8 << 30
HEAD_START_NS = 200_000_000
SLACK_SECONDS = 60
CASES = (
    "each 3:1",
    "each 1:1",
    "each 4:3:2:1",
    "tenth 3:1",
    "item 3:1",
    "think 3:1",
    "small 1:1",
    "small 3:1",
    "llm 1:1",
    "llm 3:1",
)
Lines = dict[str, tuple[float, str]]


def started(name: str, limit: int | None) -> Program:
    """Return a program that is ready. Raises BenchError: it has no torch or no device."""
    python, work = os.environ.get("TORCH_PYTHON", "python3"), ROOT / "bench/lib/windows_work.py"
    program = Program([python, str(work)], limit, name)
    answer = program.hear(SLACK_SECONDS)
    if answer != "ready":
        raise BenchError(answer)
    return program


def counts(programs: list[Program], what: str, seconds: int) -> list[list[int]]:
    """Return the steps of each program in each window; all begin at one moment."""
    at = time.monotonic_ns() + HEAD_START_NS
    for program in programs:
        program.say(f"{what} {seconds} {at}")
    return [json.loads(program.hear(seconds + SLACK_SECONDS)) for program in programs]


def alone(program: Program, what: str) -> float:
    """Return the steps of one program in a window while no other has work."""
    return sum(counts([program], what, 3 * WINDOW_SECONDS)[0][1:]) / 2


def work_of(done: list[list[int]], by_itself: list[float]) -> float:
    """Return the work of programs at one time, as the sum of what each did as a fraction of itself alone."""
    return sum(sum(steps) / one / len(steps) for steps, one in zip(done, by_itself, strict=True))


def measured(programs: list[Program], case: str, seconds: int, by_itself: list[float]) -> Lines:
    """Return the figures of one case. `by_itself`: steps of each program in a window."""
    what, _, ratio = case.partition(" ")
    weights = [int(weight) for weight in ratio.split(":")]
    taking_part = programs[: len(weights)]
    for program, weight in zip(taking_part, weights, strict=True):
        ask(verb="put", target=program.name, compute="100%", weight=100 * weight, priority="normal")
    time.sleep(0.5)
    gatekeeper = service_pids()["gatekeeper"]
    before = cpu_ms(gatekeeper)
    done = [steps[1:] for steps in counts(taking_part, what, seconds)]  # in the first window the weights take effect
    spent = cpu_ms(gatekeeper) - before
    asked = [weight / sum(weights) for weight in weights]
    worst = max(
        abs(steps / max(1, sum(window)) - part)
        for window in zip(*done, strict=True)
        for steps, part in zip(window, asked, strict=True)
    )
    print(f"# {case}: {' '.join(map(str, done))}", flush=True)
    name = f"windows_{what}_{ratio.replace(':', '_')}"
    return {
        f"{name}_share": (100 * sum(done[0]) / max(1, sum(map(sum, done))), "%"),
        f"{name}_worst": (100 * worst, "points"),
        f"{name}_sum": (work_of(done, by_itself[: len(weights)]), "of one alone"),
        f"{name}_gatekeeper": (spent / seconds / 10, "%"),
    }


def measure(cases: list[str], seconds: int) -> Lines:
    """Return the figures of all cases."""
    found: Lines = {}
    with ending() as programs:
        kinds = dict.fromkeys(case.split()[0] for case in cases)
        programs += [started(name, None) for name in ("w-alone", "w-beside")]
        unmanaged = {what: [alone(program, what) for program in programs] for what in kinds}
        for what in kinds:
            done = [steps[1:] for steps in counts(programs, what, 3 * WINDOW_SECONDS)]
            print(f"# {what} without tenants: alone {unmanaged[what]}, both {done}", flush=True)
            found[f"windows_{what}_unshared_sum"] = (work_of(done, unmanaged[what]), "of one alone")
        while programs:
            programs.pop().end()
        programs += [started(f"w-{number}", LIMIT) for number in range(max(case.count(":") for case in cases) + 1)]
        by_itself = {what: [alone(program, what) for program in programs] for what in kinds}
        for what in kinds:
            found[f"windows_{what}_alone"] = (by_itself[what][0] / unmanaged[what][0], "of no tenant")
        for case in cases:
            found |= measured(programs, case, seconds, by_itself[case.split()[0]])
    return found


def main() -> int:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--only", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=int, default=14, help="of each case (14)")
    given = parser.parse_args()
    end_in_order()
    options = ["--driver-root", given.driver_root, "--shim", str(ROOT / "build/shim/libfgpu.so"), "--listen", LISTEN]
    with tempfile.TemporaryDirectory() as policies, agent([*options, "--policies", policies]):
        record("windows", measure(given.only.split(","), given.seconds))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench windows: {error}")
