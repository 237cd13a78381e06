"""Cases of bench/compute.py with torch: trainings, small inference, graph capture, all-reduces over two devices.

Each case has a Bench as its argument and prints its figures. It raises Skip if there is no torch, or too few devices.
The programs are torch_work.py and torch_ring.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import threading
import time
from pathlib import Path

from bench.lib.service import BenchError
from bench.lib.shares import HEAD_START_NS, SLACK_SECONDS, Bench, Skip, Work
from bench.lib.tenants import Program

PYTHON = os.environ.get("TORCH_PYTHON", "python3")
LIMIT = 16 << 30
HERE = Path(__file__).parent
TORCH = ("t0", "t1", "n0", "n1")  # two tenants, and two without a gate


def _started(bench: Bench, *names: str, script: str = "torch_work.py") -> dict[str, Program]:
    """Start programs with torch, all at once, and set the shares of those in tenants. Raises Skip, BenchError."""
    if bench.given.driver_root != "/":
        raise Skip("no torch on a simulated device")
    found: dict[str, Program] = {}
    errors: list[Exception] = []

    def start(name: str) -> None:
        try:
            limit = LIMIT if name.startswith("t") else None
            found[name] = bench.program(name, [PYTHON, str(HERE / script)], limit)
        except (BenchError, OSError, Skip) as error:
            errors.append(error)

    threads = [threading.Thread(target=start, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    for name in names:
        if name.startswith("t"):
            bench.share(found[name])
    bench.settle()
    return found


def _torch(bench: Bench) -> dict[str, Program]:
    if "torch" not in bench.marks:
        bench.end()
        bench.marks.add("torch")
    return _started(bench, *TORCH)


def _run(seconds: float, *works: tuple[Program, str]) -> list[dict[str, float]]:
    """Run all works from the same moment on. Return the answer of each program."""
    start_ns = time.monotonic_ns() + HEAD_START_NS
    for program, what in works:
        program.say(f"{what} {seconds} {start_ns}")
    found = []
    for program, what in works:
        said = json.loads(program.hear(seconds + SLACK_SECONDS))
        if "error" in said:
            raise BenchError(f"{what}: {said['error']}")
        found.append(said)
    return found


class Busy(threading.Thread):
    """A thread that reads the utilization of device 0 from nvidia-smi, five times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[float] = []
        command = "nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits -i 0 -lms 200"
        self._process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, text=True)

    def run(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self.seen.append(float(line))

    def end(self) -> float:
        """Stop the thread. Return the median of the utilization, in percent."""
        self._process.kill()
        self._process.wait()
        self.join(5)
        return statistics.median(self.seen[2:] or [0.0])


def _alone(programs: dict[str, Program], what: str, seconds: float, *names: str) -> dict[str, dict[str, float]]:
    """Run each program alone. Speeds differ between processes, so each program is compared with itself alone."""
    return {name: _run(seconds, (programs[name], what))[0] for name in names}


def _parts(alone: dict[str, dict[str, float]], together: dict[str, dict[str, float]]) -> list[float]:
    """Return the steps of each program in a run with others, in percent of its steps alone."""
    return [100 * said["steps"] / alone[name]["steps"] for name, said in together.items()]


def _together(programs: dict[str, Program], seconds: float, **what: str) -> dict[str, dict[str, float]]:
    """Run programs together, and return their answers by name. `what`: the work of each program, by its name."""
    said = _run(seconds, *((programs[name], work) for name, work in what.items()))
    return dict(zip(what, said, strict=True))


def _pairs(bench: Bench, what: str, name: str, bar: float | None, rounds: int) -> None:
    """Run, `rounds` times, each program alone, then two with gates, then two without.

    Prints the sum of two, each in percent of itself alone. `bar`: the least sum with gates; the sum without gates is a
    second bar then.
    """
    programs = _torch(bench)
    seconds = 0.75 * bench.seconds if bench.quick else bench.seconds
    gated, ungated, errors, busy = [], [], [], 0.0
    for number in range(rounds):
        watch = Busy() if not number else None
        if watch:
            watch.start()
        alone = _alone(programs, what, seconds, *TORCH[:3])
        busy = watch.end() if watch else busy
        alone["n1"] = alone["n0"]
        shares = _parts(alone, _together(programs, seconds, t0=what, t1=what))
        gated.append(sum(shares))
        errors.append(100 * abs(shares[0] / max(1e-9, sum(shares)) - 0.5))
        ungated.append(sum(_parts(alone, _together(programs, seconds, n0=what, n1=what))))
    bench.line(f"{name}_alone_busy", busy, "%", least=95 if bar else None)
    driver = statistics.median(ungated)
    bench.line(f"{name}_pair", statistics.median(gated), "% of alone", least=bar and max(bar, driver))
    bench.line(f"{name}_pair_spread", max(gated) - min(gated), "points")
    bench.line(f"{name}_pair_split_error", statistics.median(errors), "points")
    bench.line(f"{name}_pair_by_the_driver", driver, "% of alone")


def train(bench: Bench) -> None:
    """Compare two trainings that fill the device with one alone, and with two that only the driver schedules."""
    _pairs(bench, "train", "train", 97, 5)


def unfilled(bench: Bench) -> None:
    """Run trainings that leave the device idle between their kernels. There is no bar."""
    _pairs(bench, "unfilled", "unfilled", None, 2 if bench.quick else 5)


def lending(bench: Bench) -> None:
    """Run pairs that the scheduler lends to each other, and pairs that it does not: each with gates, and without.

    Prints the sum of two, each in percent of itself alone: in the first 4 s, in which the trial is made, in 8 s after
    that, and without gates.
    """
    programs = _torch(bench)
    for what in ("unfilled", "small", "train"):
        alone = {name: said["steps"] / 2.5 for name, said in _alone(programs, what, 2.5, *TORCH[:3]).items()}
        alone["n1"] = alone["n0"]
        for stage, seconds, names in (
            ("first", 4, TORCH[:2]),
            ("then", 8, TORCH[:2]),
            ("by_the_driver", 4, ("n0", "n1")),
        ):
            said = _together(programs, seconds, **dict.fromkeys(names, what))
            parts = [100 * one["steps"] / seconds / alone[name] for name, one in said.items()]
            bench.line(f"lending_{what}_{stage}", sum(parts), "% of alone")


def _beside(programs: dict[str, Program], seconds: float, rounds: int, **what: str) -> dict[str, list[float]]:
    """Run programs together and each alone, in turn, because the speed of a program that runs alone varies with time.

    Returns:
        For each name in `what` the medians of two figures: its steps in percent of those alone, and the percentage by
        which its p50 is longer than alone.
    """
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in what}
    for _ in range(rounds):
        alone = {name: _run(seconds, (programs[name], work))[0] for name, work in what.items()}
        for name, said in _together(programs, seconds, **what).items():
            of, p50 = (said[key] / alone[name][key] for key in ("steps", "p50_us"))
            parts[name].append((100 * of, 100 * (p50 - 1)))
    return {name: [statistics.median(column) for column in zip(*pairs, strict=True)] for name, pairs in parts.items()}


def inference(bench: Bench) -> None:
    """Run two loops of small inference, and one with a training. Compare each with its own speed alone."""
    programs, seconds, rounds = _torch(bench), bench.seconds, 3
    for number, (part, added) in enumerate(_beside(programs, seconds, rounds, t0="small", t1="small").values()):
        bench.line(f"inference_{number}", part, "% of alone", least=45)
        bench.line(f"inference_{number}_p50_added", added, "%", most=5)
    for how, names, times, bar in (("", ("t0", "t1"), rounds, 45), ("_by_the_driver", ("n0", "n1"), 1, None)):
        found = _beside(programs, seconds, times, **dict(zip(names, ("small", "train"), strict=True)))
        for what, (part, _) in zip(("inference", "training"), found.values(), strict=True):
            bench.line(f"mixed_{what}{how}", part, "% of alone", least=bar)


def train_step(bench: Bench) -> None:
    """Measure by how much a continuous training increases the p99 of a step of 5 ms every 50 ms."""
    programs = _torch(bench)
    seconds, alone = bench.step_seconds, bench.step_alone()
    quick = bench.spin("w0")
    for priority, bar in (("high", 10.0), ("normal", 24.0)):
        bench.share(quick, priority=priority)
        programs["t0"].say(f"train {seconds + 1} {time.monotonic_ns()}")
        time.sleep(0.5)
        (said,) = bench.run(Work(quick, 100, "burst", 50), seconds=seconds)
        programs["t0"].hear(SLACK_SECONDS)
        bench.line(f"step_beside_training_p99_added_{priority}", (said.p99 - alone.p99) / 1000, "ms", most=bar)
    bench.end("w0")


def torch_capture(bench: Bench) -> None:
    """Capture graphs in the default mode while gates open and close and another thread launches all the time."""
    programs = _torch(bench)
    seconds = 60.0
    programs["t1"].say(f"train {seconds} {time.monotonic_ns()}")
    (said,) = _run(seconds, (programs["t0"], "capture"))
    programs["t1"].say("stop")
    programs["t1"].hear(SLACK_SECONDS)
    bench.line("torch_captures", said["captures"], "", least=1000)
    bench.line("torch_captures_failed", said["failed"], "", most=0)
    if said["failed"]:
        (native,) = _run(seconds, (programs["n0"], "capture"))
        print(f"# the first: {said['why']}; without a gate {native['failed']} of {native['captures']} fail")


def nccl(bench: Bench) -> None:
    """Run all-reduce loops of two tenants over the same two devices, and compare them with one loop alone.

    Each tenant has a process on each device.
    """
    bench.end()
    programs = _started(bench, "tr0", "tr1", "ring", script="torch_ring.py")
    (alone,) = _run(bench.seconds, (programs["ring"], "reduce"))
    both = [said["steps"] for said in _run(bench.seconds, (programs["tr0"], "reduce"), (programs["tr1"], "reduce"))]
    bench.line("nccl_error", abs(both[0] / max(1e-9, sum(both)) - 0.5) * 100, "points", most=2)
    bench.line("nccl_sum", 100 * sum(both) / alone["steps"], "% of alone", least=90)
    bench.end(*programs)
