"""Measure the shares of two to four torch programs in windows of 2 s: trainings, inference, an LLM, kernels.

A program's *work* is its number of steps, as a fraction of the steps that it does alone in the same time. For each
case, over all starts of the programs, prints:

    share        the share of the tenant with the highest weight, in the start with the largest error
    worst        the largest error of a share in a window after the first, in points
    sum          the lowest sum of the work of all programs
    gatekeeper   the gatekeeper's processor time

For each kind of program, prints the steps of a tenant alone as a fraction of those of a program without a tenant
(`alone`), and the sum of the work of two programs without tenants (`unshared_sum`). Steps in each window are printed as
comments.

A step of `small` is mostly Python code, whose speed varies between processes and from second to second. Therefore the
shares of `small` are shares of the time in which the programs' steps did not wait, and `working` is the sum of this
time. Programs that take turns cannot do more than a program that sleeps while another has its turn: `paused` is twice
the work of a program without a tenant, alone on the device, that sleeps for half of the time (`small` and `llm`).

Writes build/bench/windows.json, and build/bench/windows.png with the shares over time in the first start. Needs a real
GPU. TORCH_PYTHON is a Python interpreter with torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    "notebook 1:1",
    "k1x1 3:1",
    "k1x4 3:1",
    "k20x1 3:1",
    "k20x4 3:1",
)
BY_TIME = "small"  # the kind of program with shares of time instead of steps
PAUSED = ("small", "llm")  # the speed of these kinds with sleeps in between is measured
Lines = dict[str, tuple[float, str]]


@dataclass(frozen=True, slots=True)
class Done:
    """The number of a program's steps in each window, and the milliseconds that these steps took without waiting."""

    steps: list[int]
    working_ms: list[int]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one case in one start of the programs.

    `share`, `worst`, `sum`, `working` and `gatekeeper`: see the module, as fractions of 1. `windows`: the share of the
    first program in each window.
    """

    share: float
    windows: list[float]
    worst: float
    sum: float
    working: float
    gatekeeper: float


def start(
    programs: list[Program], names: Sequence[str], limit: int | None, kinds: Sequence[str],
    options: Sequence[str] = (), environment: Sequence[str] = (),
) -> None:  # fmt: skip
    """Start programs, and wait until all of them are ready. Raises BenchError if there is no torch or no device.

    Args:
        programs: the list to which they are added before any wait, so that the caller ends them also after an error.
        names: the name of each program, and of its tenant.
        limit: the memory limit of each tenant in bytes. None: the programs are in no tenant.
        kinds: the kinds of steps that the programs are to make.
        options: other options of `fgpu run`.
        environment: additional variables of the programs, as NAME=VALUE.
    """
    python, work = os.environ.get("TORCH_PYTHON", "python3"), ROOT / "bench/lib/windows_work.py"
    prefix = ["env", *environment] if environment else []
    new = [Program([*prefix, python, str(work), *kinds], limit, name, options) for name in names]
    programs += new
    for program in new:
        if (answer := program.hear(SLACK_SECONDS)) != "ready":
            raise BenchError(answer)


def answers(programs: list[Program], what: str, seconds: int, *more: str) -> list[Any]:
    """Let all programs begin at the same moment. Return the answer of each. `more`: see bench/lib/windows_work.py."""
    at = time.monotonic_ns() + HEAD_START_NS
    for program in programs:
        program.say(" ".join([what, str(seconds), str(at), *more]))
    return [json.loads(program.hear(seconds + SLACK_SECONDS)) for program in programs]


def counts(programs: list[Program], what: str, seconds: int) -> list[Done]:
    """Let all programs begin at the same moment. Return the steps of each in each window after the first."""
    return [Done(steps[1:], working[1:]) for steps, working in answers(programs, what, seconds)]


@contextmanager
def enforcing(driver_root: str) -> Iterator[None]:
    """Run an agent without policies for the block."""
    options = ["--driver-root", driver_root, "--shim", str(ROOT / "build/shim/libfgpu.so"), "--listen", LISTEN]
    with tempfile.TemporaryDirectory() as policies, agent([*options, "--policies", policies]):
        yield


def alone(program: Program, what: str) -> float:
    """Return the steps of one program in a window while no other program has work."""
    return sum(counts([program], what, 2 * WINDOW_SECONDS)[0].steps)


def most_of(what: str, cases: list[str]) -> int:
    """Return the largest number of programs in a case of this kind."""
    return max(case.count(":") + 1 for case in cases if case.split()[0] == what)


def work_of(done: list[Done], by_itself: list[float]) -> float:
    """Return the sum of the work of programs that ran at the same time. `by_itself`: the steps of each alone."""
    return sum(sum(one.steps) / rate / len(one.steps) for one, rate in zip(done, by_itself, strict=True))


def measured(programs: list[Program], case: str, seconds: int, by_itself: list[float]) -> Result:
    """Run one case. `by_itself`: the steps of each program alone in a window."""
    what, _, ratio = case.partition(" ")
    weights = [int(weight) for weight in ratio.split(":")]
    taking_part = programs[: len(weights)]
    for program, weight in zip(taking_part, weights, strict=True):
        ask(verb="put", target=program.name, compute="100%", weight=100 * weight, priority="normal")
    time.sleep(0.5)  # until the weights are in force
    gatekeeper = service_pids()["gatekeeper"]
    before = cpu_ms(gatekeeper)
    done = counts(taking_part, what, seconds)
    spent = cpu_ms(gatekeeper) - before
    amounts = [one.working_ms if what == BY_TIME else one.steps for one in done]
    print(f"# {case}: steps {[one.steps for one in done]}, ms {[one.working_ms for one in done]}", flush=True)
    parts = [[part / max(1, sum(window)) for part in window] for window in zip(*amounts, strict=True)]
    asked = [weight / sum(weights) for weight in weights]
    return Result(
        share=sum(amounts[0]) / max(1, sum(map(sum, amounts))),
        windows=[window[0] for window in parts],
        worst=max(abs(part - due) for window in parts for part, due in zip(window, asked, strict=True)),
        sum=work_of(done, by_itself[: len(weights)]),
        working=sum(sum(one.working_ms) for one in done) / 1000 / WINDOW_SECONDS / len(parts),
        gatekeeper=spent / seconds / 1000,
    )


def figures(case: str, results: list[Result]) -> Lines:
    """Return the figures of one case, over all starts."""
    what, _, ratio = case.partition(" ")
    weights = [int(weight) for weight in ratio.split(":")]
    due = weights[0] / sum(weights)
    name = f"windows_{what}_{ratio.replace(':', '_')}"
    found = {
        f"{name}_share": (100 * max((one.share for one in results), key=lambda share: abs(share - due)), "%"),
        f"{name}_worst": (100 * max(one.worst for one in results), "points"),
        f"{name}_sum": (min(one.sum for one in results), "of one alone"),
        f"{name}_gatekeeper": (100 * max(one.gatekeeper for one in results), "%"),
    }
    if what == BY_TIME:
        found[f"{name}_working"] = (100 * min(one.working for one in results), "% of the time")
    return found


def without_tenants(kinds: list[str]) -> tuple[Lines, dict[str, float]]:
    """Return the figures of two programs without tenants, and the steps of the first one alone in a window, by kind."""
    found: Lines = {}
    paused = [what for what in PAUSED if what in kinds]
    with ending() as programs:
        start(programs, ("w-alone", "w-beside"), None, [*kinds, *(f"{what}-paused" for what in paused)])
        rates = {what: [alone(program, what) for program in programs] for what in kinds}
        for what in kinds:
            both = counts(programs, what, 3 * WINDOW_SECONDS)
            print(f"# {what} without tenants: alone {rates[what]}, both {[one.steps for one in both]}", flush=True)
            found[f"windows_{what}_unshared_sum"] = (work_of(both, rates[what]), "of one alone")
        for what in paused:
            steps = 2 * alone(programs[0], f"{what}-paused")
            found[f"windows_{what}_paused"] = (steps / rates[what][0], "of one alone")
    return found, {what: rates[what][0] for what in kinds}


def measure(cases: list[str], seconds: int, starts: int) -> tuple[Lines, dict[str, list[Result]]]:
    """Return the figures of all cases, and the results of each start."""
    kinds = list(dict.fromkeys(case.split()[0] for case in cases))
    found, unmanaged = without_tenants(kinds)
    results: dict[str, list[Result]] = {case: [] for case in cases}
    for number in range(starts):
        with ending() as programs:
            names = [f"w-{n}" for n in range(max(most_of(what, cases) for what in kinds))]
            start(programs, names, LIMIT, kinds)
            by_itself = {what: [alone(program, what) for program in programs[: most_of(what, cases)]] for what in kinds}
            print(f"# alone in a tenant: {by_itself}", flush=True)
            if number == 0:
                for what in kinds:
                    found[f"windows_{what}_alone"] = (by_itself[what][0] / unmanaged[what], "of no tenant")
            for case in cases:
                results[case].append(measured(programs, case, seconds, by_itself[case.split()[0]]))
    for case in cases:
        found |= figures(case, results[case])
    return found, results


def plot(results: dict[str, list[Result]], path: Path) -> None:
    """Draw the share of the first tenant over time, with a line for each case of two tenants with weights 3:1."""
    try:
        import matplotlib
    except ImportError:
        print("# no matplotlib: no plot")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.5), layout="constrained")
    for case, starts in results.items():
        if case.endswith(" 3:1"):
            seconds = [WINDOW_SECONDS * (number + 1.5) for number in range(len(starts[0].windows))]
            axes.plot(seconds, [100 * share for share in starts[0].windows], label=case.split()[0], linewidth=1.0)
    axes.axhspan(72, 78, alpha=0.1)
    axes.set(ylim=(40, 100), xlabel="seconds", ylabel="share, %")
    axes.legend(ncols=3)
    figure.savefig(path)


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--only", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=int, default=14, help="of each case (14)")
    parser.add_argument("--starts", type=int, default=1, help="of the programs (1)")
    given = parser.parse_args()
    end_in_order()
    with enforcing(given.driver_root):
        found, results = measure(given.only.split(","), given.seconds, given.starts)
    record("windows", found)
    plot(results, ROOT / "build/bench/windows.png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench windows: {error}")
