"""Measure the time that fgpu adds to cuInit when many processes call it at the same moment.

Prints `storm_pNN_WHICH_PHASE VALUE ms`. WHICH is the kind of a storm:

    bare        no agent, no probe, no shim
    unmanaged   no process is in a tenant
    managed     each process is in a separate tenant
    shared      all processes are in one tenant; in all other storms each process has its own cgroup

PHASE is a part of a process's life, by CLOCK_MONOTONIC in the process and in bench/lib/inside.py:

    start    from execve until the call: linker, preloaded libraries, dlopen, lookup of the function
    before   from the call to the beginning of the driver's function
    driver   the driver's function
    after    from its end until the program has the result
    added    before + after: the part of the call outside the driver
    again    a second call of the function, which sends no hello
    whole    from execve to the result

`storm_pNN_whole_WHICH_less_bare` is the difference of `whole` to the bare storms. Differences of the driver itself
contribute to it. `bare_less_bare`, between the first and the last bare storm, is a measure of these.

Then prints the gatekeeper's counts (a process without an answer to its hello gets no memory), and the processor time of
gatekeeper, agent and processes. Writes build/bench/storm.json. Exits with 1 if a bar is missed. Starts and stops the
agent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.lib.service import ROOT, BenchError, agent, end_in_order, percentile
from bench.lib.tenants import RUN, Program, ask, cgroup_root, children_ms, cpu_ms, ending, record, service_pids

ADDED_P50_MS, ADDED_P99_MS = 5.0, 300.0
LIMIT = 32 << 20  # small, so that 300 tenants fit on a device
NS_PER_MS = 1e6
STORM_SECONDS = 120.0
PHASES = ("start", "before", "driver", "after", "added", "again", "whole")
GREETED = {"unmanaged": "hello_unmanaged", "managed": "hello_managed", "shared": "hello_managed"}
NUMBERS = 6  # numbers that storm.c prints for each process: its struct told
NO_COUNTS = {"started_ns", "processes", "boot"}
SETTLE_SECONDS = 1.5  # the gatekeeper saves its counts once a second


def phases(told: list[int], inside: list[int]) -> dict[str, float]:
    """Return the phases of one process, in milliseconds.

    Args:
        told: the numbers of struct told in bench/programs/storm.c.
        inside: when the process entered and left the driver's function, in nanoseconds.
    """
    _, _, executed, called, returned, again = told
    entered, left = inside
    ns = {"start": called - executed, "before": entered - called, "driver": left - entered, "after": returned - left}
    ns |= {"added": ns["before"] + ns["after"], "again": again - returned, "whole": returned - executed}
    return {phase: took / NS_PER_MS for phase, took in ns.items()}


@dataclass(frozen=True, slots=True)
class Found:
    """The results of all storms of one kind.

    `processes` has the phases of all processes, `wholes` the phase `whole` of each process by storm, and `counted` the
    counts of the gatekeeper and the processor times.
    """

    processes: list[dict[str, float]] = field(default_factory=list)
    wholes: list[list[float]] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)

    def percentile(self, phase: str, percent: int) -> float:
        """Return a percentile of a phase over all processes, in milliseconds."""
        return percentile([process[phase] for process in self.processes], percent)


@dataclass(frozen=True, slots=True)
class Storms:
    """The parameters of all storms, and their results.

    `count`: the number of processes. `program`: build/bench/storm. `folders`: the cgroups of the processes. `inside`:
    the running bench/lib/inside.py.
    """

    count: int
    program: Path
    folders: list[Path]
    inside: Program
    found: dict[str, Found] = field(default_factory=lambda: {which: Found() for which in ("bare", *GREETED)})

    def launcher(self, programs: list[Program], folders: list[Path], name: str = "") -> Program:
        """Start a program that makes processes in these cgroups in turn. With a name, it starts by `fgpu run`."""
        programs.append(Program([str(self.program), *map(str, folders)], LIMIT if name else None, name))
        if programs[-1].hear() != "ready":
            raise BenchError("storm is not ready")
        return programs[-1]

    def storm(self, launcher: Program, which: str) -> None:
        """Run one storm, and add its results."""
        self._inside()
        spent = children_ms(launcher.process.pid)
        launcher.say(str(self.count))
        numbers = [int(word) for word in launcher.hear(STORM_SECONDS).split()]
        found, inside = self.found[which], self._inside()
        found.counted["process_cpu"] += children_ms(launcher.process.pid) - spent
        told = [numbers[at : at + NUMBERS] for at in range(0, len(numbers), NUMBERS)]
        failed = Counter(result for _, result, *_ in told if result)
        if failed or len(told) != self.count:
            raise BenchError(f"{len(told)} of {self.count} answered, with these errors: {dict(failed)}")
        processes = [phases(one, inside[str(one[0])]) for one in told]
        found.processes.extend(processes)
        found.wholes.append([process["whole"] for process in processes])

    def _inside(self) -> dict[str, list[int]]:
        self.inside.say("")
        return dict(json.loads(self.inside.hear()))


@contextlib.contextmanager
def cgroups(count: int) -> Iterator[list[Path]]:
    """Make `count` cgroups, and remove them after the block."""
    parent = cgroup_root() / f"fgpu-storm-{os.getpid()}"
    folders = [parent / str(number) for number in range(count)]
    end_in_order()
    try:
        for folder in folders:
            folder.mkdir(parents=True)
        yield folders
    finally:
        for folder in (*folders, parent):
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()


def bare(asked: Storms) -> None:
    """Run a storm without agent and shim."""
    with ending() as programs:
        asked.storm(asked.launcher(programs, asked.folders), "bare")


def counts() -> Counter[str]:
    """Return the gatekeeper's counts so far, and its processor time."""
    time.sleep(SETTLE_SECONDS)
    said = json.loads((RUN / "gatekeeper.json").read_text())
    found = Counter({name: n for name, n in said.items() if name not in NO_COUNTS and isinstance(n, int)})
    found.update({f"{name}_cpu": cpu_ms(pid) for name, pid in service_pids().items()})
    return found


def greeted(asked: Storms, programs: list[Program], kinds: tuple[str, ...]) -> None:
    """Run a storm of each of these kinds in turn, and add the gatekeeper's counts to the results."""
    for which in kinds:
        folders = asked.folders[:1] if which == "shared" else asked.folders
        launcher = asked.launcher(programs, folders, f"storm-{which}-{len(programs)}")
        before = counts()
        asked.storm(launcher, which)
        after = counts()
        after.subtract(before)
        after["not_greeted"] = asked.count - after[GREETED[which]]
        asked.found[which].counted.update(+after)  # unary plus: only counts above 0


def with_agent(asked: Storms, options: list[str]) -> None:
    """Run the storms that need an agent: first in unmanaged cgroups, then in tenants."""
    with agent(options), ending() as programs:
        greeted(asked, programs, ("unmanaged", "unmanaged"))
        for folder in asked.folders:
            ask(verb="put", target=f"/{folder.relative_to(cgroup_root())}", memory=f"{LIMIT}B")
        greeted(asked, programs, ("managed", "shared", "shared", "managed"))


def report(found: dict[str, Found]) -> int:
    """Print all figures. Return 1 if a bar is missed."""
    lines: dict[str, tuple[float, str]] = {}
    held = []
    for percent, bar in ((50, ADDED_P50_MS), (99, ADDED_P99_MS)):
        for which, one in found.items():
            for phase in PHASES:
                lines[f"storm_p{percent}_{which}_{phase}"] = (one.percentile(phase, percent), "ms")
        wholes = found["bare"].wholes
        lines[f"storm_p{percent}_whole_bare_less_bare"] = (difference(wholes[-1], wholes[0], percent), "ms")
        for which in GREETED:
            more = found[which].percentile("whole", percent) - found["bare"].percentile("whole", percent)
            lines[f"storm_p{percent}_whole_{which}_less_bare"] = (more, "ms")
            held.append(found[which].percentile("added", percent) <= bar)
    for which, one in found.items():
        for name, n in sorted(one.counted.items()):
            each = name.endswith("_cpu")
            lines[f"storm_{which}_{name}"] = (n / len(one.processes), "ms each") if each else (n, "")
    held += [not found[which].counted["not_greeted"] for which in GREETED]
    lines["storm_bars_held"] = (sum(held), f"of {len(held)}")
    record("storm", lines)
    return 0 if all(held) else 1


def difference(some: list[float], others: list[float], percent: int) -> float:
    """Return the difference between a percentile of `some` and that of `others`."""
    return percentile(some, percent) - percentile(others, percent)


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=1, help="each has two storms of each kind")
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    parser.add_argument("--program", type=Path, default=ROOT / "build/bench/storm")
    parser.add_argument("--python", default="/usr/bin/python3", help="an interpreter that can import BCC")
    given = parser.parse_args()
    options = ["--driver-root", given.driver_root, "--shim", str(given.shim)]
    try:
        with cgroups(given.processes) as folders, ending() as programs:
            programs.append(Program([given.python, "-I", str(ROOT / "bench/lib/inside.py"), "cuInit"], name="inside"))
            if programs[0].hear() != "ready":
                raise BenchError("no probe at the driver's cuInit")
            asked = Storms(given.processes, given.program, folders, programs[0])
            for _ in range(given.rounds):
                bare(asked)
                with_agent(asked, options)
                bare(asked)
    except (BenchError, OSError) as error:
        print(f"bench storm: {error}", file=sys.stderr)
        return 1
    return report(asked.found)


if __name__ == "__main__":
    sys.exit(main())
