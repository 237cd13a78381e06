"""Measure the shares of two torch programs that run at the same time on a concurrent device: training, LLM, inference.

A program's *work* is its number of steps, as a fraction of the steps that it does alone in the same time. For each pair
of programs and each pair of weights, prints the work of both programs, the share of the first one, the sum, and the
50th and 99th percentile of a step of each program in milliseconds. `mode`:

    concurrent   tenants of a concurrent device, with NVIDIA's MPS
    mps          tenants without a share of time, with NVIDIA's MPS
    turns        tenants that take turns, without MPS

Prints the gatekeeper's processor time in each mode. Writes build/bench/concurrent.json. Needs a real GPU. TORCH_PYTHON
is a Python interpreter with torch.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.lib.mps import CONFIG, FOLDER, mps
from bench.lib.service import FGPU, ROOT, BenchError, agent, end_in_order, percentile
from bench.lib.tenants import Program, cpu_ms, ending, record, service_pids

LISTEN = "127.0.0.1:19425"
LIMIT = 8 << 30
KINDS = ("each", "llm", "small", "notebook")
HEAD_START_NS = 100_000_000


def ends(program: Program, kind: str, seconds: float, start_ns: int) -> None:
    """Make a program run for some seconds from `start_ns` on."""
    program.say(f"{kind} {seconds} {start_ns} ends")


def work(program: Program, seconds: float, warm_ns: int) -> tuple[float, list[float]]:
    """Return the steps a second of a program after `warm_ns`, and the milliseconds of each step."""
    found = [at for at in json.loads(program.hear()) if at > warm_ns]
    took = [(b - a) / 1e6 for a, b in itertools.pairwise(found)]
    return len(found) / seconds, took or [0.0]


class Bench:
    """The programs, and what each of them does alone."""

    def __init__(self, mode: str, programs: list[Program], given: argparse.Namespace) -> None:
        self.mode, self.seconds, self.warm = mode, given.seconds, given.warm
        self.by_kind: dict[str, list[Program]] = {}
        for kind, program in zip((*given.kinds, *given.kinds), programs, strict=True):
            self.by_kind.setdefault(kind, []).append(program)
        self.alone: dict[str, float] = {}
        self.lines: dict[str, tuple[float, str]] = {}

    def measure_alone(self) -> None:
        """Run the first program of each kind alone."""
        for kind, programs in self.by_kind.items():
            (self.alone[kind], took), *_ = self._run({kind: programs[0]})
            print(f"{self.mode} alone {kind}: {self.alone[kind]:.1f} a second, p50 {statistics.median(took):.2f} ms,"
                  f" p99 {percentile(took, 99):.2f} ms", flush=True)  # fmt: skip

    def _run(self, programs: dict[str, Program]) -> list[tuple[float, list[float]]]:
        start_ns = time.monotonic_ns() + HEAD_START_NS
        for key, program in programs.items():
            ends(program, key.partition(" ")[0], self.warm + self.seconds, start_ns)
        return [work(program, self.seconds, start_ns + round(self.warm * 1e9)) for program in programs.values()]

    def pair(self, first: str, second: str, weights: tuple[int, int]) -> None:
        """Run two programs at the same time with these weights."""
        programs = self.by_kind[first][0], self.by_kind[second][1]
        if self.mode != "mps":
            for program, weight in zip(programs, weights, strict=True):
                command = [*FGPU, "set", program.name, "--weight", str(weight * 100)]
                subprocess.run(command, check=True, capture_output=True, timeout=30)
        begun, used_ms = time.monotonic(), cpu_ms(service_pids()["gatekeeper"])
        found = self._run({first: programs[0], f"{second} 2": programs[1]})
        busy = (cpu_ms(service_pids()["gatekeeper"]) - used_ms) / (time.monotonic() - begun) / 10
        got = [found[0][0] / self.alone[first], found[1][0] / self.alone[second]]
        share = got[0] / sum(got) if sum(got) else 0.0
        took = "  ".join(f"p50 {statistics.median(each):.2f} p99 {percentile(each, 99):.2f}"
                         if len(each) > 1 else "-" for _, each in found)  # fmt: skip
        print(f"{self.mode:10} {first:8} {second:8} {weights[0]}:{weights[1]}  {got[0]:.3f} + {got[1]:.3f} ="
              f" {sum(got):.3f}  share {share:.3f}  {took}  gatekeeper {busy:.1f} %", flush=True)  # fmt: skip
        name = f"{self.mode}_{first}_{second}_{weights[0]}_{weights[1]}"
        self.lines |= {f"{name}_sum": (sum(got), ""), f"{name}_share": (share, "")}


def measure(mode: str, given: argparse.Namespace) -> dict[str, tuple[float, str]]:
    """Measure all pairs in one mode."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config = Path(folder, "agent.yaml")
        config.write_text(CONFIG if mode == "concurrent" else "{}\n")
        Path(folder, "policy.d").mkdir()
        options = ["--driver-root", given.driver_root, "--shim", str(given.shim), "--listen", LISTEN]
        options += ["--policies", f"{folder}/policy.d", "--config", str(config)]
        stack.enter_context(agent(options))
        if mode != "turns":
            stack.enter_context(mps())
        programs = stack.enter_context(ending())
        for number, kind in enumerate((*given.kinds, *given.kinds)):
            command = [given.python, str(ROOT / "bench/lib/windows_work.py"), kind]
            command = ["env", f"CUDA_MPS_PIPE_DIRECTORY={FOLDER}", *command] if mode == "mps" else command
            shares = [] if mode == "mps" else ["--weight", "100"]
            programs.append(Program(command, LIMIT, f"{kind}-{number}", shares))
        for program in programs:
            if (said := program.hear()) != "ready":
                raise BenchError(said)
        bench = Bench(mode, programs, given)
        bench.measure_alone()
        for first, second in itertools.combinations_with_replacement(given.kinds, 2):
            for weights in ((1, 1),) if mode == "mps" else ((1, 1), (3, 1)):
                bench.pair(first, second, weights)
        return bench.lines


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    parser.add_argument("--python", default=os.environ.get("TORCH_PYTHON", "python3"))
    parser.add_argument("--modes", default="concurrent,mps,turns")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case (default: %(default)s)")
    parser.add_argument("--warm", type=float, default=1.5, help="seconds before these that are not counted")
    given = parser.parse_args()
    given.kinds = tuple(given.kinds.split(","))
    end_in_order()
    lines: dict[str, tuple[float, str]] = {}
    try:
        for mode in given.modes.split(","):
            lines |= measure(mode, given)
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        print(f"bench concurrent: {error}", file=sys.stderr)
        return 1
    record("concurrent", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
