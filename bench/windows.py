"""Shares of two torch programs in windows of 2 s: trainings that wait after every step or every tenth, inference, LLM.

Prints a line for each case: the heavier tenant's share, the largest error in a window after the first in points, what
both did together as a fraction of one program alone that has no tenant, the gatekeeper's processor time, and the steps
in each window. Writes build/bench/windows.json. Needs a real GPU; TORCH_PYTHON is an interpreter that has torch.
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
LIMIT = 16 << 30
HEAD_START_NS = 200_000_000
SLACK_SECONDS = 60
CASES = ("each 3:1", "each 1:1", "tenth 3:1", "item 3:1", "think 3:1", "small 1:1", "small 3:1", "llm 1:1", "llm 3:1")
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


def measured(pair: list[Program], case: str, seconds: int, alone: float) -> Lines:
    """Return the figures of one case. `alone`: steps of one program in a second."""
    what, _, ratio = case.partition(" ")
    weights = [int(weight) for weight in ratio.split(":")]
    for program, weight in zip(pair, weights, strict=True):
        ask(verb="put", target=program.name, compute="100%", weight=100 * weight, priority="normal")
    time.sleep(0.5)
    gatekeeper = service_pids()["gatekeeper"]
    before = cpu_ms(gatekeeper)
    one, other = counts(pair, what, seconds)
    spent = cpu_ms(gatekeeper) - before
    one, other = one[1:], other[1:]  # in the first window the weights take effect
    asked = weights[0] / sum(weights)
    worst = max(abs(a / max(1, a + b) - asked) for a, b in zip(one, other, strict=True))
    both = sum(one) + sum(other)
    print(f"# {case}: {one} {other}", flush=True)
    name = f"windows_{what}_{ratio.replace(':', '_')}"
    return {
        f"{name}_share": (100 * sum(one) / max(1, both), "%"),
        f"{name}_worst": (100 * worst, "points"),
        f"{name}_sum": (both / len(one) / WINDOW_SECONDS / alone, "of one alone"),
        f"{name}_gatekeeper": (spent / seconds / 10, "%"),
    }


def measure(cases: list[str], seconds: int) -> Lines:
    """Return the figures of all cases."""
    found: Lines = {}
    with ending() as programs:
        programs.append(started("w-alone", None))
        kinds = dict.fromkeys(case.split()[0] for case in cases)
        alone = {what: counts(programs, what, 2 * WINDOW_SECONDS)[0][1] / WINDOW_SECONDS for what in kinds}
        programs.pop().end()
        programs += [started(name, LIMIT) for name in ("w-heavy", "w-light")]
        for case in cases:
            found |= measured(programs, case, seconds, alone[case.split()[0]])
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
