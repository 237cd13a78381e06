"""Cases of bench/compute.py: the division of a device by weights, ceilings, demand and priority, and its cost.

Each case has a Bench as its argument and prints its figures. The programs of tenants (bench/programs/spin.c) run on
from case to case, and each case sets their shares again.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Sequence

from bench.lib.shares import Bench, Work
from bench.lib.tenants import cpu_ms, service_pids

WIDE = ((4, 3, 2, 1), (1,) * 8)
SPLIT_BAR, LONG_BAR, LIMIT_BAR, JAIN_BAR = 1.0, 3.0, 1.5, 0.999
LONG_US = 50_000
LONG_GRAPH_US = 4000
DRAIN_MS = 2.0


def split(bench: Bench, weights: Sequence[int], kernel: int, how: str) -> None:
    """Run busy tenants with these weights, and print the largest error of a share."""
    seconds = bench.seconds * (2 if len(weights) > 4 or kernel == LONG_US else 1)
    alone = bench.rate(kernel, how)
    said = bench.run(*(Work(program, kernel, how) for program in bench.tenants(*weights)), seconds=seconds)
    done = [one.done for one in said]
    wrong = [abs(n / max(1.0, sum(done)) - w / sum(weights)) * 100 for n, w in zip(done, weights, strict=True)]
    name = f"{'_'.join(map(str, weights))}_{kernel}us_{how}"
    bench.line(f"{name}_error", max(wrong), "points", most=LONG_BAR if kernel == LONG_US else SPLIT_BAR)
    bench.line(f"{name}_sum", 100 * sum(done) / seconds / alone, "%")
    if len(weights) == 8:
        bench.line(f"{name}_jain", sum(done) ** 2 / (8 * max(1.0, sum(n * n for n in done))), "", least=JAIN_BAR)


def pairs(bench: Bench) -> None:
    """Run two tenants 1:1, 3:1 and 9:1 with every kernel, launched in every way. With --quick, only some of these."""
    for kernel in map(int, bench.given.kernels.split(",")):
        for how in bench.given.hows.split(","):
            for weights in ((1, 1), (3, 1), (9, 1)):
                if not bench.quick or _is_quick(weights, kernel, how):
                    split(bench, weights, kernel, how)


def _is_quick(weights: tuple[int, int], kernel: int, how: str) -> bool:
    """Return whether --quick includes this case.

    A graph cannot be interrupted, so a short run with a few long graphs cannot result in exact shares.
    """
    if how == "graph" and kernel >= LONG_GRAPH_US:
        return weights == (1, 1) and kernel < LONG_US
    if weights == (9, 1):
        return how == "one" or kernel < LONG_US
    return (kernel, how) == (200, "burst") or (weights == (1, 1) and how in ("one", "graph"))


def wide(bench: Bench) -> None:
    """Run four tenants 4:3:2:1, and eight equal ones."""
    for weights in WIDE:
        split(bench, weights, 200, "burst")


def limit(bench: Bench) -> None:
    """Run one tenant alone, with ceilings."""
    for percent in (25, 50, 75):
        for kernel in (200, 4000):
            before = bench.rate_now(kernel, "one")
            (program,) = bench.tenants(1)
            bench.share(program, compute=f"{percent}%")
            (said,) = bench.run(Work(program, kernel))
            alone = (before + bench.rate_now(kernel, "one")) / 2  # the device's clock rate depends on its earlier load
            got = 100 * said.done / bench.seconds / alone
            bench.line(f"limit_{percent}_{kernel}us_got", got, "%")
            bench.line(f"limit_{percent}_{kernel}us_error", abs(got - percent), "points", most=LIMIT_BAR)
            ended = bench.times(program)  # time that is lost in a pause of the whole machine is not compensated
            pause = max((b - a for a, b in itertools.pairwise(ended)), default=0)
            bench.line(f"limit_{percent}_{kernel}us_pause", pause / 1e6, "ms")


def idle(bench: Bench) -> None:
    """Measure the share of a tenant after its neighbour was busy and has become idle."""
    alone = bench.rate(200, "burst")
    busy, rests = bench.tenants(1, 1)
    bench.run(Work(rests, 200), seconds=0.1)
    (said,) = bench.run(Work(busy, 200, "burst"))
    bench.line("idle_neighbour_share_used", 100 * said.done / bench.seconds / alone, "%", least=97)


def small(bench: Bench) -> None:
    """Run two loops of steps of 0.1 ms, and compare each with one loop alone without a gate."""
    (alone,) = bench.run(Work(bench.spin(), 100))
    said = bench.run(*(Work(program, 100) for program in bench.tenants(1, 1)))
    for number, one in enumerate(said):
        bench.line(f"small_steps_{number}", 100 * one.done / alone.done, "% of alone", least=45)
        bench.line(f"small_steps_{number}_p50_added", 100 * (one.p50 / alone.p50 - 1), "%", most=5)


def step(bench: Bench) -> None:
    """Measure by how much a tenant with continuous bursts increases the p99 of a step of 5 ms every 50 ms."""
    alone = bench.step_alone()
    for priority, bar in (("high", 10.0), ("normal", 20 + DRAIN_MS + 2)):
        quick, hog = bench.tenants(1, 1)
        bench.share(quick, priority=priority)
        said = bench.run(Work(quick, 100, "burst", 50), Work(hog, 200, "burst"), seconds=bench.step_seconds)
        bench.line(f"step_p99_added_{priority}", (said[0].p99 - alone.p99) / 1000, "ms", most=bar)
        bench.line(f"step_p50_added_{priority}", (said[0].p50 - alone.p50) / 1000, "ms")


def gatekeeper(bench: Bench) -> None:
    """Measure the gatekeeper's processor time for turns between two busy tenants."""
    seconds = max(bench.seconds, 3.0)
    works = [Work(program, 200, "burst") for program in bench.tenants(1, 1)]
    bench.begin(*works, seconds=seconds)
    time.sleep(seconds / 4)
    pid = service_pids()["gatekeeper"]
    spent, begun = cpu_ms(pid), time.monotonic()
    time.sleep(seconds / 2)
    busy = (cpu_ms(pid) - spent) / 10 / (time.monotonic() - begun)
    for work in works:
        bench.heard(work.program, seconds)
    bench.line("gatekeeper_cpu", busy, "% of a core", most=2)


def launch(bench: Bench) -> None:
    """Measure the time that the shim adds to a launch at an open gate, by batches of 1,000 with and without a gate."""
    bench.end()  # another tenant would sometimes close the gate
    (program,) = bench.tenants(1)
    both, cpu = (bench.spin(), program), max(os.sched_getaffinity(0))
    added = []
    for number in range(-5, 40 if bench.quick else 200):
        took = []
        for one in both if number % 2 else both[::-1]:
            one.say(f"launch 1 {cpu}")
            took.append(int(one.hear()))
        native, managed = took if number % 2 else took[::-1]
        if number >= 0:
            added.append((managed - native) / 1e6)  # from nanoseconds of 1,000 launches to microseconds of one
    bench.line("launch_added", statistics.median(added), "us", most=0.1)


def under_limit(bench: Bench) -> None:
    """Measure by how many percent a limit of 75 % lengthens steps of 5 ms every 10 ms, which need 50 %."""
    found = []
    for number in range(2 if bench.quick else 5):
        (program,) = bench.tenants(1)
        bench.share(program, compute="75%")
        work = [("native", bench.spin()), ("managed", program)]
        mean = {
            name: bench.run(Work(one, 100, "burst", 10), seconds=bench.seconds / 2)[0].mean
            for name, one in (work if number % 2 else work[::-1])
        }
        found.append(100 * (mean["managed"] / mean["native"] - 1))
    bench.line("under_limit_added", statistics.median(found), "%", most=1)
