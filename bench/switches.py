"""Measure what a change of turns costs: two torch programs with equal weights, and when each of their steps ended.

For each kind of step, relative to the mean step of the same program alone in its tenant:

    gap      how much longer it takes from the last step of one program until the first step of the other has ended
    first    how much longer the next step takes (its code and data have left the caches)
    inner    how much longer all later steps of a turn take
    turn     how long a turn is, from the end of its first step to the end of its last step
    warm     how much longer steps alone take after the programs ran together than before: the effect of heat

Prints medians over both programs (for `warm`, the mean), and the sum of their work as a fraction of one alone. Writes
build/bench/switches.json. Needs a real GPU. TORCH_PYTHON is a Python interpreter with torch.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys

from bench.lib.service import BenchError, end_in_order
from bench.lib.tenants import Program, ask, ending, record
from bench.windows import LIMIT, answers, enforcing, start

ALONE_SECONDS = 3
LEAST_STEPS = 8  # shorter turns, which a step longer than a quarter of a quantum makes, are left out
Lines = dict[str, tuple[float, str]]


def mean_step(ended: list[int]) -> float:
    """Return the mean nanoseconds of a step."""
    return (ended[-1] - ended[0]) / (len(ended) - 1)


def mean_step_alone(program: Program, what: str) -> float:
    """Return the mean nanoseconds of a step of one program while no other program has work."""
    return mean_step(*answers([program], what, ALONE_SECONDS, "ends"))


def turns(both: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Return the turns: the number of the program, and when its steps in this turn ended."""
    steps = sorted((ended, number) for number, ends in enumerate(both) for ended in ends)
    runs = itertools.groupby(steps, key=lambda step: step[1])
    return [(number, [ended for ended, _ in of_turn]) for number, of_turn in runs]


def figures(what: str, before: list[float], both: list[list[int]], after: list[float]) -> Lines:
    """Return the figures of one kind. `before`, `after`: the mean step of each program alone. Raises BenchError."""
    all_turns = turns(both)
    gap, first, inner, length = [], [], [], []
    for (_, earlier), (number, ended) in itertools.pairwise(all_turns):
        if min(len(earlier), len(ended)) >= LEAST_STEPS:
            gap.append(ended[0] - earlier[-1] - before[number])
            first.append(ended[1] - ended[0] - before[number])
            inner.append(mean_step(ended[1:]) - before[number])
            length.append(ended[-1] - ended[0])
    if len(gap) < LEAST_STEPS:
        raise BenchError(f"{what}: {len(gap)} turns with {LEAST_STEPS} steps")
    spent = max(ended[-1] for ended in both) - min(ended[0] for ended in both)
    work = sum(alone * len(ended) for alone, ended in zip(before, both, strict=True)) / spent
    warm = statistics.mean(late - early for early, late in zip(before, after, strict=True))
    found = {"gap": gap, "first": first, "inner": inner}
    return {
        **{f"switches_{what}_{name}": (statistics.median(values) / 1000, "us") for name, values in found.items()},
        f"switches_{what}_warm": (warm / 1000, "us"),
        f"switches_{what}_step": (statistics.mean(before) / 1000, "us"),
        f"switches_{what}_turn": (statistics.median(length) / 1_000_000, "ms"),
        f"switches_{what}_sum": (work, "of one alone"),
    }


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--only", default="llm,each", help="kinds of bench/lib/windows_work.py (llm,each)")
    parser.add_argument("--seconds", type=int, default=8, help="that the programs run together (8)")
    given = parser.parse_args()
    end_in_order()
    kinds = given.only.split(",")
    with enforcing(given.driver_root), ending() as programs:
        start(programs, ("s-0", "s-1"), LIMIT, kinds)
        for program in programs:
            ask(verb="put", target=program.name, compute="100%", weight=100, priority="normal")
        found: Lines = {}
        for what in kinds:
            before = [mean_step_alone(program, what) for program in programs]
            both = answers(programs, what, given.seconds, "ends")
            after = [mean_step_alone(program, what) for program in programs]
            found |= figures(what, before, both, after)
    record("switches", found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench switches: {error}")
