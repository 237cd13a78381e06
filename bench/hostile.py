"""Run a hostile tenant and three honest tenants for MINUTES, the second half with `onBypass: kill`.

Prints `hostile_NAME VALUE UNIT`: the attacks of each kind (tried, done, killed, refused), the refusals of honest
tenants, the lowest share of an honest tenant in a window of 2 s minus its part by weight, the times of pings and the
processor time of agent and gatekeeper, and for how long memory of the hostile tenant was uncharged or above its limit,
or one of its processes was not reported. Also counts what the tenants leave in agent, gatekeeper and kernel, and what
is left on the host after `fgpu detach`. Then prints each bar, `hostile_bar_NAME VALUE, at most VALUE UNIT`. Writes
build/bench/hostile.json. Exits with 1 if a bar is missed.

The hostile tenant has the processor weight of a pod without requests (`cpu.shares` 2, `cpu.weight` 1) and nice 19,
because the host divides processor time, and fgpu does not.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.lib.hostile_bars import Bar, ProcessorUse, highest_of_99_percent
from bench.lib.hostile_books import Excess, compare
from bench.lib.hostile_remains import Host, Kept
from bench.lib.hostile_shares import Processors, Waits, Window, slicer_of, windows
from bench.lib.tenants import record, service_pids
from tests.support.commands import ask
from tests.support.host import BUILD, ENVIRONMENT, FGPU, GIB, SHIM, SIM, cgroup_root
from tests.support.service import Service, compile_programs
from tests.support.sim_driver import driver_dump
from tests.support.wait import eventually

WEIGHTS = (300, 200, 100)
HOSTILE_WEIGHT = 100
LIMIT = 2 * GIB
MOST_MIB = 1024  # the maximum that an honest tenant allocates at a time; its context uses 518 MiB of its 2 GiB
MOST_BYPASS_MIB = {"report": 700, "kill": 3072}  # with `report`, only the size of the device limits a bypass
PING_SECONDS, COMPARE_SECONDS = 0.05, 0.4
LATE_SECONDS, POINTS = 1.0, 3.0
# The bars: the highest permitted figures, by name. In addition, no window of an honest tenant is more than POINTS below
# its share, and acts that prove something must have happened (_not_done).
MOST = {
    "honest_refused": 0,
    "honest_wrong": 0,
    "ping_agent_p99": 100,
    "ping_gatekeeper_p99": 100,
    "processor_agent": 25,
    "processor_gatekeeper": 25,
    "uncharged_longest": LATE_SECONDS,
    "unnamed_longest": LATE_SECONDS,
    "above_longest": LATE_SECONDS,
    "restarts": 0,
    "left_of_tenants": 0,
    "left_on_host": 0,
}
COLUMNS = ("tried", "done", "killed", "refused")
NEVER_DONE = {"control_done"}  # acts that must always be refused
GROUP = "fgpu-hostile"
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: hostile}}
spec:
  selector: {{cgroup: ["{group}/tenant", "{group}/tenant/**"]}}
  memory: {{limit: 2GiB}}
  compute: {{weight: {weight}}}
  onBypass: {on_bypass}
"""


def processor_cgroups(cgroup: Path) -> list[Path]:
    """Give this tenant the lowest processor weight. Return the cgroups of version 1 that were made for that."""
    found = []
    if (cgroup / "cpu.weight").exists():
        (cgroup / "cpu.weight").write_text("1")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            found.append(Path(folder) / GROUP)
            found[-1].mkdir(exist_ok=True)
            (found[-1] / "cpu.shares").write_text("2")
    return found


class Lateness:
    """The longest time for which a condition was true, measured by repeated checks."""

    def __init__(self) -> None:
        self.since: dict[object, float] = {}
        self.longest = 0.0

    def look(self, found: Iterable[object], why: str) -> None:
        """Record the objects for which the condition is true now.

        `why` is printed if an object has a new longest time, and this time is above LATE_SECONDS.
        """
        now = time.monotonic()
        self.since = {one: self.since.get(one, now) for one in found}
        longest = max([self.longest, *(now - since for since in self.since.values())])
        if longest > max(self.longest, LATE_SECONDS):
            print(f"# {longest:.2f} s: {why}", flush=True)
        self.longest = longest


class Run:
    """The tenants, and the measurements so far."""

    def __init__(self, service: Service, work: Path, seed: int) -> None:
        self.service, self.work, self.random = service, work, random.Random(seed)
        self.cgroup = cgroup_root() / GROUP / "tenant"
        self.late = {name: Lateness() for name in ("uncharged", "unnamed", "above")}
        self.pings: dict[str, list[float]] = {"agent": [], "gatekeeper": []}
        self.operations: collections.Counter[str] = collections.Counter()
        self.honest: list[subprocess.Popen[str]] = []
        self.honest_pids: list[int] = []
        self.waits: Waits | None = None
        self.bypass_log = open(work / "bypasses", "a+", encoding="ascii")  # noqa: SIM115
        self.bypasses: set[int] = set()  # processes that bypass and hold driver memory
        self.left_out: list[str] = []  # kinds of acts that the hostile tenant leaves out
        self.excess = Excess()
        self._compared = 0.0  # when driver and agent were last compared, by the monotonic clock

    def start_honest(self) -> None:
        """Start three honest tenants, each with its limit and weight."""
        for n, weight in enumerate(WEIGHTS):
            command = [*FGPU, "run", "--memory", f"{LIMIT}B", "--weight", str(weight), "--name", f"honest{n}", "--"]
            command += [str(BUILD / "e2e/honest"), str(self.work / f"honest{n}"), str(MOST_MIB)]
            command.append(str(self.random.randrange(1 << 30)))
            pipe = subprocess.PIPE
            self.honest.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT))
        for one in self.honest:
            assert one.stdout
            word, pid = one.stdout.readline().split()
            assert word == "ready", "an honest tenant"
            self.honest_pids.append(int(pid))
        time.sleep(1)  # until the slicer has run for longer than all other threads, except the gatekeeper's main thread
        tasks = [Path(f"/proc/{pid}/task/{pid}") for pid in self.honest_pids]
        device = self.service._driver
        assert device
        tasks += [slicer_of(pid) for pid in self.service.gatekeepers()]
        self.waits = Waits([*tasks, Path(f"/proc/{device.pid}/task/{device.pid}")])

    def end_honest(self) -> list[list[int]]:
        """End the honest tenants. Return for each its steps, its tries, and how many were refused or wrong."""
        if self.waits:
            self.waits.end()
        said = [one.communicate("", timeout=30)[0].split() for one in self.honest]
        return [[int(word) for word in words[1:]] for words in said]

    def attack(self, seconds: float, on_bypass: str) -> None:
        """Run the hostile tenant for `seconds`, and measure during this time."""
        policy = POLICY.format(group=GROUP, weight=HOSTILE_WEIGHT, on_bypass=on_bypass)
        (self.service.policies / "hostile.yaml").write_text(policy)
        self.cgroup.mkdir(parents=True, exist_ok=True)
        eventually(self._tenant, 10, "the policy")
        time.sleep(1)
        private = self.work / "libprivate.so.1"
        shutil.copy(SIM / "lib/libcuda.so.1", private)
        words = [BUILD / "e2e/hostile", self.random.randrange(1 << 30), seconds, self.work, self.cgroup, private]
        words += [MOST_BYPASS_MIB[on_bypass], *self.left_out]
        folders = [self.cgroup, *processor_cgroups(self.cgroup)]
        into = "".join(f"echo $$ >{folder}/cgroup.procs; " for folder in folders)
        enter = ["sh", "-c", f'{into}exec nice -n 19 "$@"', "sh", *map(str, words)]
        environment = {**ENVIRONMENT, "LD_PRELOAD": str(SHIM)}
        process = subprocess.Popen(enter, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        try:
            while process.poll() is None:
                self._look(on_bypass == "kill")
        finally:
            process.kill()
        assert process.stdout
        for line in process.stdout:
            name, *numbers = line.split()
            for what, number in zip(COLUMNS, numbers, strict=False):
                self.operations[f"{name}_{what}"] += int(number)
                if on_bypass == "kill" and (name, what) == ("bypass", "killed"):
                    self.operations["killed_under_kill"] += int(number)
        assert process.wait() == 0, "the hostile program itself failed"

    def _tenant(self) -> dict[str, Any] | None:
        found = [t for t in ask(verb="snapshot")["tenants"] if t["path"] == f"/{GROUP}/tenant"]
        return found[0] if found else None

    def _look(self, is_kill: bool) -> None:
        """Ping, and compare if the last comparison was COMPARE_SECONDS ago: it costs the agent a Snapshot."""
        time.sleep(PING_SECONDS)
        self.ping()
        if time.monotonic() < self._compared + COMPARE_SECONDS:
            return
        self._compared = time.monotonic()
        self.bypasses |= {int(line) for line in self.bypass_log.readlines()}
        books = driver_dump()
        tenants = ask(verb="snapshot")["tenants"]
        now = compare(books, tenants, f"/{GROUP}/tenant", self.honest_pids, self.excess.look(books))
        self.bypasses &= now.holding
        unnamed, is_above = now.unnamed(self.bypasses), is_kill and now.used_bytes > LIMIT
        self.late["uncharged"].look(now.uncharged, f"uncharged {set(now.uncharged)}: {now.text}")
        self.late["unnamed"].look(unnamed, f"unnamed {unnamed} of which bypass {self.bypasses}: {now.text}")
        self.late["above"].look({"bytes"} if is_above else (), f"above its limit: {now.text}")

    def ping(self) -> None:
        """Measure the time until agent and gatekeeper answer."""
        begun = time.monotonic()
        ask(verb="ping")
        self.pings["agent"].append(time.monotonic() - begun)
        begun = time.monotonic()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(10)
            sock.connect("/run/fgpu/shim/shim.sock")
            sock.send(struct.pack("=IHH", 0x75706766, 3, 64) + bytes(56))
            assert sock.recv(512), "the gatekeeper's answer"
        self.pings["gatekeeper"].append(time.monotonic() - begun)

    def windows(self, begun_ns: int, ended_ns: int) -> list[Window]:
        """Return every window of 2 s of each honest tenant, between two times of CLOCK_MONOTONIC."""
        whole = sum(WEIGHTS) + HOSTILE_WEIGHT
        records = [self.work / f"honest{n}" for n in range(len(WEIGHTS))]
        assert self.waits
        return windows(records, [weight / whole for weight in WEIGHTS], self.waits, begun_ns, ended_ns)


def shares(found: list[Window], before: Processors) -> dict[str, tuple[float, str]]:
    """Return the figures of the worst windows, and how long honest threads waited for a processor."""
    idle, stolen = Processors.now().since(before)
    worst = min(found, key=lambda one: one.ready_points)
    wall = min(found, key=lambda one: one.points)
    for n in range(len(WEIGHTS)):
        one = min((one for one in found if one.program == n), key=lambda one: one.ready_points)
        print(
            f"# honest{n} at {one.at_seconds:.1f} s: {one.points:.1f} points, {one.ready_points:.1f} of the rest",
            end="",
        )
        print(f"; without a processor {100 * one.waited:.1f} %, {100 * one.own_waited:.1f} its own thread")
    return {
        "hostile_least_share": (worst.ready_points, "points of the time with a processor"),
        "hostile_least_share_wall": (wall.points, "points of all time"),
        "hostile_waits_for_processors": (100 * sum(one.waited for one in found) / len(found), "%"),
        "hostile_waits_for_processors_worst": (100 * max(one.waited for one in found), "%"),
        "hostile_processors_idle": (idle, "%"),
        "hostile_processors_stolen": (stolen, "%"),
    }


def report(run: Run, honest: list[list[int]], found: dict[str, tuple[float, str]]) -> int:
    """Print all figures and all bars. Return 1 if a bar is missed."""
    lines: dict[str, tuple[float, str]] = {f"hostile_{name}": (n, "") for name, n in run.operations.items()}
    for n, name in enumerate(("steps", "tries", "refused", "wrong")):
        lines[f"hostile_honest_{name}"] = (sum(one[n] for one in honest), "")
    lines |= found
    for name, pings in run.pings.items():
        lines[f"hostile_ping_{name}_p99"] = (1000 * highest_of_99_percent(pings), "ms")
        lines[f"hostile_ping_{name}_worst"] = (1000 * max(pings), "ms")
    lines |= {f"hostile_{name}_longest": (late.longest, "s") for name, late in run.late.items()}
    bars = [Bar(name, *lines[f"hostile_{name}"], most) for name, most in MOST.items()]
    bars.append(Bar("share_lost", -found["hostile_least_share"][0], "points", POINTS))
    missed = [bar.name for bar in bars if not bar.is_met] + (_not_done(run.operations) if not run.left_out else [])
    record("hostile", lines | {"hostile_missed": (len(missed), "")})
    print(*(bar.line() for bar in bars), sep="\n")
    print(f"hostile_missed {' '.join(missed) or 'nothing'}")
    return 1 if missed else 0


def _not_done(operations: collections.Counter[str]) -> list[str]:
    """Return the missed bars of the attacks.

    A kind of act that never succeeded is a missed bar, because the run proves nothing about it. A granted request that
    must be refused is one too.
    """
    wanted = [name for name in operations if name.endswith(("_tried", "_done")) and name not in NEVER_DONE]
    wanted = [*(name for name in wanted if "accepted" not in name), "control_refused", "killed_under_kill"]
    return [name for name in wanted if not operations[name]] + ["accepted"] * bool(operations["accepted_tried"])


def leave_nothing(run: Run) -> None:
    """Kill all processes of the tenants, and remove their cgroups."""
    for one in run.honest:
        one.kill()
    with contextlib.suppress(OSError):
        (run.cgroup / "cgroup.kill").write_text("1")
        eventually(lambda: "populated 0" in (run.cgroup / "cgroup.events").read_text(), 10)
    for root in (run.cgroup.parent, *processor_cgroups(run.cgroup)):
        for inside, _, _ in os.walk(root, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(inside)


def main() -> int:
    """Read the command line, run both phases and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("minutes", type=float, nargs="?", default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--alone", action="store_true", help="no hostile tenant: prints only the shares")
    parser.add_argument("--without", metavar="KIND", action="append", default=[], help="leave out this kind of acts")
    given = parser.parse_args()
    print(f"hostile_seed {given.seed}", flush=True)
    compile_programs()
    host = Host.now()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        work.chmod(0o755)
        service = Service(work)
        run = Run(service, work, given.seed)
        run.left_out = given.without
        try:
            service.start_driver("40GiB")  # room for all tenants, with their contexts and the bypasses under `report`
            service.start_agent()
            run.ping()  # after this the gatekeeper has an answer for the cgroup of this process
            kept = Kept.now(pids := service_pids())
            run.start_honest()
            before, begun, use = Processors.now(), time.monotonic_ns(), ProcessorUse(pids)
            for on_bypass in ("report", "kill"):
                time.sleep(given.minutes * 30) if given.alone else run.attack(given.minutes * 30, on_bypass)
            ended, used = time.monotonic_ns(), use.percent()
            honest = run.end_honest()
            found = shares(run.windows(begun, ended), before)
            service.check()
            restarts = sum(pids[name] != pid for name, pid in service_pids().items())
            leave_nothing(run)
            tenants_left = kept.left()
        finally:
            leave_nothing(run)
            service.stop()
    if given.alone:
        record("hostile_alone", {name.replace("hostile", "hostile_alone"): line for name, line in found.items()})
        return 0
    host_left = host.left()
    for one in (*tenants_left, *host_left):
        print(f"# left: {one}")
    found |= {f"hostile_processor_{name}": (percent, "% of a core") for name, percent in used.items()}
    found["hostile_restarts"] = (restarts, "")
    found |= {"hostile_left_of_tenants": (len(tenants_left), ""), "hostile_left_on_host": (len(host_left), "")}
    return report(run, honest, found)


if __name__ == "__main__":
    sys.exit(main())
