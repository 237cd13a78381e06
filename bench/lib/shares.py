"""The common parts of bench/compute.py's cases: programs that run on from case to case, and figures with their bars.

Each program is in a tenant or outside all tenants. The module imports nothing of fgpu. Errors are BenchError.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.lib.service import BenchError
from bench.lib.tenants import Program, ask

LIMIT = 1 << 30
HEAD_START_NS = 20_000_000  # from the command to the beginning, so that all programs begin at the same moment
SLACK_SECONDS = 60.0
SETTLE_SECONDS = 0.2
PREFIX = f"compute-{os.getpid()}-"


class Skip(Exception):
    """This machine lacks something that a case needs. The text has the reason."""


@dataclass(frozen=True, slots=True)
class Said:
    """A program's answer: the number of kernels that it completed, and the lengths of its steps in microseconds."""

    done: float
    p50: float
    p99: float
    mean: float


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a program.

    `kernel` is the length of a CUDA kernel in microseconds, and `how` the way of launching: one, burst, graph or
    cooperative. `period_ms` is the period of a step; 0: as fast as possible.
    """

    program: Program
    kernel: int
    how: str = "one"
    period_ms: float = 0.0


class Bench:
    """The programs, and the figures so far."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.quick = given, bool(given.quick)
        self.seconds: float = given.seconds
        self.lines: dict[str, tuple[float, str]] = {}
        self.missed: list[str] = []
        self.marks: set[str] = set()  # facts about the running programs that a case records for later cases
        self._programs: dict[str, Program] = {}
        self._shares: dict[str, dict[str, object]] = {}
        self._steps: list[Said] = []
        self.step_seconds = max(self.seconds, 5.5)  # at least 110 steps, so that the p99 is not the longest step
        self._settled = 0.0  # when the current shares will be in force
        self._rates: dict[tuple[int, str], float] = {}

    # -- programs

    def program(self, name: str, command: Sequence[str], limit: int | None, ready: str = "ready") -> Program:
        """Return the running program with this name. Start it if necessary.

        Raises:
            Skip: the program reports that something is missing.
            BenchError: the program does not start.
        """
        if name not in self._programs:
            program = self._programs[name] = Program(list(command), limit, f"{PREFIX}{name}")
            said = program.hear()
            if said.startswith("-"):
                self.end(name)
                raise Skip(said[1:].strip())
            if said != ready:
                raise BenchError(f"{name} is not ready: {said}")
        return self._programs[name]

    def spin(self, name: str = "") -> Program:
        """Return a running spin program in a tenant with this name; without a name, one outside every tenant."""
        return self.program(name or "solo", [str(self.given.program)], LIMIT if name else None)

    def tenants(self, *weights: int) -> list[Program]:
        """Return spin programs in tenants w0, w1, ... with these weights, without ceilings, with normal priority."""
        found = [self.spin(f"w{number}") for number in range(len(weights))]
        for program, weight in zip(found, weights, strict=True):
            self.share(program, weight=100 * weight)
        return found

    def share(self, program: Program, **share: object) -> None:
        """Set the share of a program's tenant. Values that are not given get their defaults."""
        asked = {"compute": "100%", "weight": 100, "priority": "normal"} | share
        if self._shares.get(program.name) == asked:
            return
        ask(verb="put", target=program.name, **asked)
        self._shares[program.name] = asked
        self._settled = time.monotonic() + SETTLE_SECONDS

    def end(self, *names: str) -> None:
        """End the programs with these names, or all programs if there are no names."""
        if not names:
            self.marks.clear()
        for name in names or tuple(self._programs):
            program = self._programs.pop(name)
            self._shares.pop(program.name, None)
            program.end()

    # -- measuring

    def settle(self) -> None:
        """Wait until the shares are in force. The gatekeeper reads them ten times a second."""
        time.sleep(max(0.0, self._settled - time.monotonic()))

    def run(self, *works: Work, seconds: float | None = None) -> list[Said]:
        """Run all works from the same moment on, and return the answers of the programs."""
        seconds = self.seconds if seconds is None else seconds
        self.begin(*works, seconds=seconds)
        return [self.heard(work.program, seconds) for work in works]

    def begin(self, *works: Work, seconds: float) -> int:
        """Make all programs begin at the same moment. Return that moment, in CLOCK_MONOTONIC nanoseconds."""
        self.settle()
        start_ns = time.monotonic_ns() + HEAD_START_NS
        for work in works:
            work.program.say(f"{seconds} {work.period_ms} {start_ns} {work.kernel} {work.how}")
        return start_ns

    def heard(self, program: Program, seconds: float) -> Said:
        """Wait for a program's answer, and return it."""
        words = program.hear(seconds + SLACK_SECONDS).split()
        if len(words) != 5:
            raise BenchError(f"{program.name}: {' '.join(words)}")
        return Said(float(words[4]), float(words[1]), float(words[2]), float(words[3]))

    def times(self, program: Program, of: str = "times") -> list[int]:
        """Return when each step of the program's last run ended, in CLOCK_MONOTONIC nanoseconds.

        `of`: "launched" for the times of launches.
        """
        program.say(of)
        return [int(word) for word in program.hear().split()]

    def rate(self, kernel: int, how: str) -> float:
        """Return the kernels a second that a program without a gate completes alone. It is measured once."""
        if (kernel, how) not in self._rates:
            self._rates[kernel, how] = self.rate_now(kernel, how)
        return self._rates[kernel, how]

    def rate_now(self, kernel: int, how: str) -> float:
        """Measure the kernels a second that a program without a gate completes alone."""
        seconds = max(0.5, min(self.seconds / 4, 3), 10 * kernel / 1e6)
        (said,) = self.run(Work(self.spin(), kernel, how), seconds=seconds)
        return said.done / seconds

    def step_alone(self) -> Said:
        """Return the lengths of steps of 5 ms every 50 ms of a program alone, without a gate. Measured once."""
        if not self._steps:
            self._steps = self.run(Work(self.spin(), 100, "burst", 50), seconds=self.step_seconds)
        return self._steps[0]

    # -- figures

    def line(self, name: str, value: float, unit: str, most: float | None = None, least: float | None = None) -> None:
        """Print one figure and record it. If it has a bar (`most`, `least`), print whether the bar is held."""
        self.lines[f"compute_{name}"] = (value, unit)
        held = (most is None or value <= most) and (least is None or value >= least)
        bar = "" if most is least is None else f"   # {'PASS' if held else 'MISS'}: bar {_bar(most, least)}"
        print(f"compute_{name} {value:.4g} {unit}{bar}", flush=True)
        if not held:
            self.missed.append(name)


def _bar(most: float | None, least: float | None) -> str:
    return " and ".join(f"{sign} {bar:g}" for sign, bar in (("<=", most), (">=", least)) if bar is not None)


def options(parser: argparse.ArgumentParser, root: Path) -> None:
    """Add the options of bench/compute.py to a parser. `root`: the root of the repository."""
    parser.add_argument("--seconds", type=float, help="of each measurement: 10, or 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="the hardest splits alone, all cases within 4 minutes")
    parser.add_argument("--kernels", default="20,200,4000,50000", help="microseconds, of the splits")
    parser.add_argument("--hows", default="one,burst,graph,cooperative", help="of the splits")
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=root / "build/shim/libfgpu.so")
    parser.add_argument("--program", type=Path, default=root / "build/bench/spin")
