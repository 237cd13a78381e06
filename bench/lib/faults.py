"""Cases of bench/compute.py: owners that are killed or stopped, no gatekeeper, a busy agent, two devices.

Each case has a Bench as its argument and prints its figures. The effect on a neighbour is measured by the times at
which the neighbour's own steps end. Times are CLOCK_MONOTONIC.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.lib.service import ROOT, BenchError, percentile
from bench.lib.shares import LIMIT, Bench, Work
from bench.lib.tenants import Program, ask, cgroup_root, service_pids

KERNEL_US, NS_PER_MS = 200, 1e6
DEADLINE_MS = 20 + 2.5 + 1 + 1.5  # quantum, work in flight, silence after it, and the time of the checks
LEASE_NS = 2_000_000_000
TENANTS = 1000
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: bench}
spec:
  selector: {cgroup: ["fgpu-bench/*"]}
  memory: {limit: 1GiB}
"""
SCRAPE = """
import sys, time, urllib.request
end, n = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    urllib.request.urlopen("http://" + sys.argv[1] + "/metrics", timeout=30).read()
    n += 1
print(n)
"""


def gaps_ms(ended: list[int], since_ns: int) -> list[float]:
    """Return the gaps between ends of steps after `since_ns`, each minus the time of a kernel.

    The first gap is that from `since_ns` to the first end.
    """
    pairs = [(a, b) for a, b in itertools.pairwise([since_ns, *[at for at in ended if at > since_ns]])]
    return [(b - a) / NS_PER_MS - KERNEL_US / 1000 for a, b in pairs]


@dataclass(frozen=True, slots=True)
class Hit:
    """A signal to an owner, and its effect on a neighbour. Times are CLOCK_MONOTONIC nanoseconds.

    `start_ns`: when the neighbour began. `at_ns`: the time of the signal. `ended`, `launched`: when the neighbour's
    steps ended and were launched.
    """

    start_ns: int
    at_ns: int
    ended: list[int]
    launched: list[int]

    def gaps(self) -> list[float]:
        """Return the gaps between the neighbour's steps after the signal, in milliseconds."""
        return gaps_ms(self.ended, self.at_ns)

    def waited(self) -> bool:
        """Return whether the neighbour was waiting at the time of the signal."""
        return self.at_ns - max((at for at in self.ended if at <= self.at_ns), default=self.start_ns) > NS_PER_MS

    def opens_ms(self) -> float:
        """Return the milliseconds from the signal to the launch of the first step that ended after it.

        The result is 0 if that step was launched before the signal.
        """
        steps = zip(self.ended, self.launched, strict=True)
        return max(0, next(launched for ended, launched in steps if ended > self.at_ns) - self.at_ns) / NS_PER_MS

    def longest_ms(self, from_ms: float, to_ms: float) -> float:
        """Return the longest gap that overlaps the time between `from_ms` and `to_ms` after the signal."""
        span = [self.at_ns + ms * NS_PER_MS for ms in (from_ms, to_ms)]
        pairs = [(a, b) for a, b in itertools.pairwise(self.ended) if a <= span[1] and b >= span[0]]
        return max(((b - a) / NS_PER_MS - KERNEL_US / 1000 for a, b in pairs), default=1e6)


def hit(bench: Bench, sign: signal.Signals, neighbour: Program, victim: Program, name: str) -> Hit:
    """Send a signal to a busy program, and measure its neighbour. The program is killed afterwards."""
    start_ns = bench.begin(Work(neighbour, KERNEL_US), seconds=1.0)
    bench.begin(Work(victim, KERNEL_US, "burst"), seconds=60)
    time.sleep(0.5)
    at_ns = time.monotonic_ns()
    os.kill(victim.process.pid, sign)
    bench.heard(neighbour, 1.0)
    said = Hit(start_ns, at_ns, bench.times(neighbour), bench.times(neighbour, "launched"))
    os.kill(victim.process.pid, signal.SIGKILL)
    bench.end(name)
    return said


def hits(bench: Bench, sign: signal.Signals) -> list[Hit]:
    """Send the signal to a tenant with nine tenths of the device, several times.

    Returns:
        The hits at which the neighbour was waiting.
    """
    found = []
    for number in range(4 if bench.quick else 12):
        (neighbour,) = bench.tenants(1)
        victim = bench.spin(f"victim-{number}")
        bench.share(victim, weight=900)
        one = hit(bench, sign, neighbour, victim, f"victim-{number}")
        if not one.gaps():
            raise BenchError(f"after {sign.name} the neighbour completed no step")
        found += [one] if one.waited() else []
    if not found:
        raise BenchError("the neighbour never waited")
    return found


def killed(bench: Bench) -> None:
    """Kill an owner. Measure how long its neighbour waits at the gate and for its next kernel.

    The longest gaps of a neighbour are also measured for two programs in no tenant.
    """
    found = hits(bench, signal.SIGKILL)
    bench.line("owner_killed_gate_opens", max(one.opens_ms() for one in found), "ms")
    bench.line("owner_killed_next_runs", max(one.gaps()[0] for one in found), "ms", most=5)
    bench.line("owner_killed_times", len(found), "")
    native = [_killed_natively(bench, number) for number in range(2 if bench.quick else 6)]
    for when, (from_ms, to_ms) in {"before": (-200, -1), "after": (0, 200)}.items():
        gaps = [one.longest_ms(from_ms, to_ms) for one in native]
        bench.line(f"native_killed_gap_{when}", max(gaps), "ms")


def _killed_natively(bench: Bench, number: int) -> Hit:
    name = f"native-{number}"
    victim = bench.program(name, [str(bench.given.program)], None)
    return hit(bench, signal.SIGKILL, bench.spin(), victim, name)


def stopped(bench: Bench) -> None:
    """Stop an owner with SIGSTOP. The next tenant must run within DEADLINE_MS, and wait once only."""
    found = hits(bench, signal.SIGSTOP)
    bench.line("owner_stopped_next_runs", max(one.gaps()[0] for one in found), "ms", most=DEADLINE_MS)
    waits = max(sum(gap > 5 for gap in one.gaps()) for one in found)
    bench.line("owner_stopped_waits", waits, "gaps of 5 ms", most=1)


def gatekeeper_killed(bench: Bench) -> None:
    """Kill the gatekeeper. Measure the longest time without work, and the shares after the lease has ended.

    The agent starts another gatekeeper.
    """
    seconds = 6.5 if bench.quick else 12.0
    heavy, light = bench.tenants(3, 1)
    start_ns = bench.begin(Work(heavy, KERNEL_US), Work(light, KERNEL_US), seconds=seconds)
    time.sleep(0.5)
    pid, at_ns = service_pids()["gatekeeper"], time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    back_ns = _another_gatekeeper(pid)
    for program in (heavy, light):
        bench.heard(program, seconds)
    ended = {program.name: bench.times(program) for program in (heavy, light)}
    bench.line("gatekeeper_killed_back", (back_ns - at_ns) / 1e9, "s")
    longest = max(max(gaps_ms(times, at_ns), default=1e6) for times in ended.values()) / 1000
    bench.line("gatekeeper_killed_longest_wait", longest, "s", most=2.1)
    end_ns = start_ns + int(seconds * 1e9)
    since_ns = max(back_ns, at_ns + LEASE_NS) + 1_000_000_000
    done = [sum(since_ns < at <= end_ns for at in times) for times in ended.values()]
    bench.line("gatekeeper_killed_error_after", abs(done[0] / max(1, sum(done)) - 0.75) * 100, "points", most=1)


def _another_gatekeeper(than: int) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if service_pids()["gatekeeper"] != than:
                return time.monotonic_ns()
        time.sleep(0.01)
    raise BenchError("no other gatekeeper within 10 s")


@contextlib.contextmanager
def _crowd(bench: Bench) -> Iterator[None]:
    """Make TENANTS idle tenants for the block."""
    parent = cgroup_root() / "fgpu-bench"
    policy: Path = bench.given.policies / "bench.yaml"
    folders = [parent / f"t{number}" for number in range(TENANTS)]
    try:
        policy.write_text(POLICY, encoding="utf-8")
        for folder in folders:
            folder.mkdir(parents=True)
        ask(verb="reload")
        deadline = time.monotonic() + 20
        while sum(t["path"].startswith("/fgpu-bench/") for t in ask(verb="snapshot")["tenants"]) < TENANTS:
            if time.monotonic() > deadline:
                raise BenchError(f"{TENANTS} tenants are not in force within 20 s")
            time.sleep(0.2)
        yield
    finally:
        policy.unlink(missing_ok=True)
        for folder in (*folders, parent):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(BenchError, OSError):
            ask(verb="reload")


def _hand_overs_ms(bench: Bench, seconds: float) -> list[float]:
    """Return the milliseconds from the end of one tenant's last step to the end of the next tenant's first step.

    The time of a kernel is subtracted.
    """
    both = bench.tenants(1, 1)
    bench.run(*(Work(program, KERNEL_US) for program in both), seconds=seconds)
    merged = sorted((at, number) for number, program in enumerate(both) for at in bench.times(program))
    pairs = itertools.pairwise(merged)
    return [(b[0] - a[0]) / NS_PER_MS - KERNEL_US / 1000 for a, b in pairs if a[1] != b[1]]


def scrape(bench: Bench) -> None:
    """Measure how much repeated scrapes of the metrics delay a change of turns, with a thousand tenants."""
    seconds = 4.0 if bench.quick else 20.0
    with _crowd(bench):
        quiet = _hand_overs_ms(bench, seconds)
        command = [sys.executable, "-c", SCRAPE, bench.given.listen, str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as scraper:
            scraped = _hand_overs_ms(bench, seconds)
            said = scraper.communicate(timeout=60)[0]
    for percent in (50, 99):
        now, before = percentile(scraped, percent), percentile(quiet, percent)
        bench.line(f"switch_p{percent}", before, "ms")
        bench.line(f"scrape_delays_switch_p{percent}", now - before, "ms", most=1 if percent == 99 else None)
    bench.line("scrapes", int(said), "")


def capture(bench: Bench) -> None:
    """Capture 1,000 CUDA graphs in the default mode, while another thread launches and a neighbour has its turns."""
    seconds = 20.0 if bench.quick else 60.0
    (neighbour,) = bench.tenants(1)
    program = bench.program("captures", [str(ROOT / "build/bench/capture")], LIMIT)
    bench.share(program)
    bench.begin(Work(neighbour, KERNEL_US, "burst"), seconds=seconds)
    program.say(f"1000 {seconds}")
    made, failed, first = (int(word) for word in program.hear(seconds + 60).split())
    turns = ask(verb="snapshot")["tenants"]
    (waits,) = [t["devices"][0]["compute"]["waits"] for t in turns if t["tenant"] == program.name]
    os.kill(neighbour.process.pid, signal.SIGKILL)  # without this, it would run for some more seconds
    bench.end("captures", neighbour.name.rpartition("-")[2])
    bench.line("captures", made, "", least=1000)
    bench.line("captures_failed", failed, f"the first with {first}" if failed else "", most=0)
    bench.line("captures_turns", waits, "", least=10)


def gang(bench: Bench) -> None:
    """Run two tenants whose kernels on two devices wait for each other, so that a tenant needs both devices at once."""
    bench.end()
    names = ("g0", "g1")
    command = str(ROOT / "build/bench/meet")
    gangs = [bench.program(name, [command, str(11 + i)], LIMIT) for i, name in enumerate(names)]
    solo = bench.program("gsolo", [command, "13"], None)
    for program in gangs:
        bench.share(program)
    (alone,) = bench.run(Work(solo, KERNEL_US))
    said = bench.run(*(Work(program, KERNEL_US) for program in gangs))
    bench.end("gsolo", *names)
    done = [one.done for one in said]
    bench.line("gang_error", abs(done[0] / max(1.0, sum(done)) - 0.5) * 100, "points", most=2)
    bench.line("gang_sum", 100 * sum(done) / alone.done, "% of alone", least=90)
