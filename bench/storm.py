"""What fgpu adds to cuInit when many processes call it at one moment: with the service, in tenants, and without both.

Prints `storm_pNN_WHICH VALUE ms`, from execve to the return of cuInit as each process saw it: WHICH is native (no
agent, no probe, no shim; every process in a cgroup of its own), together (native, all of them in one cgroup), managed
(every process a tenant of its own), shared (all of them in one tenant), and for the last two the part that is added to
what has the same cgroups; then what the gatekeeper counted (a process that it did not greet gets no memory), and
processor time: the gatekeeper's, the agent's, theirs. Writes build/bench/storm.json; 1 where a bar is missed. Storms go
native, together, managed, shared, shared, managed, together, native, so that none has the warmer machine. Starts and
stops the agent itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from memory import ROOT, BenchError, agent, end_in_order, percentile
from tenants import RUN, Program, ask, cgroup_root, children_ms, cpu_ms, ending, record, service_pids

ADDED_P50_MS, ADDED_P99_MS = 5.0, 300.0
LIMIT = 32 << 20  # 300 of them fit on a device
NS_PER_MS = 1e6
STORM_SECONDS = 120.0
NATIVE = {"managed": "native", "shared": "together"}  # what each is compared to
TENANTS = tuple(NATIVE)
NO_COUNTS = {"started_ns", "processes", "boot"}
SETTLE_SECONDS = 1.5  # the gatekeeper writes its counts down once a second


@dataclass(frozen=True, slots=True)
class Storm:
    """What is asked for: how many processes, of which program, in which cgroups."""

    processes: int
    program: Path
    folders: list[Path]

    def launch(self, programs: list[Program], folders: list[Path], name: str = "") -> Program:
        """A program that makes the processes, each in the next of the folders; with the shim, if it has a name."""
        programs.append(Program([str(self.program), *map(str, folders)], LIMIT if name else None, name))
        if programs[-1].hear() != "ready":
            raise BenchError("storm is not ready")
        return programs[-1]

    def times(self, launcher: Program, said: Counter[str]) -> list[float]:
        """One storm, in milliseconds; what its processes cost is added to `said`."""
        spent = children_ms(launcher.process.pid)
        launcher.say(str(self.processes))
        took = [int(word) for word in launcher.hear(STORM_SECONDS).split()]
        said["process_cpu"] += children_ms(launcher.process.pid) - spent
        failed = Counter(-ns for ns in took if ns <= 0)
        if failed or len(took) != self.processes:
            raise BenchError(f"{len(took)} of {self.processes} answered, with these errors: {dict(failed)}")
        return [ns / NS_PER_MS for ns in took]


@contextlib.contextmanager
def cgroups(count: int) -> Iterator[list[Path]]:
    """New cgroups, gone afterwards."""
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


def native(asked: Storm, which: Iterable[str], found: dict[str, list[float]], said: dict[str, Counter[str]]) -> None:
    """Without agent and shim, in the same cgroups."""
    places = {"native": asked.folders, "together": asked.folders[:1]}
    for name in which:
        with ending() as programs:
            found[name] += asked.times(asked.launch(programs, places[name]), said[name])


def counts() -> Counter[str]:
    """What the gatekeeper has counted so far, and its processor time."""
    time.sleep(SETTLE_SECONDS)
    said = json.loads((RUN / "gatekeeper.json").read_text())
    found = Counter({name: n for name, n in said.items() if name not in NO_COUNTS and isinstance(n, int)})
    found.update({f"{name}_cpu": cpu_ms(pid) for name, pid in service_pids().items()})
    return found


def managed(asked: Storm, options: list[str], found: dict[str, list[float]], said: dict[str, Counter[str]]) -> None:
    """In tenants: every process one of its own, then all in one; then once more, the other way round."""
    with agent(options), ending() as programs:
        for folder in asked.folders:
            ask(verb="put", target=f"/{folder.relative_to(cgroup_root())}", memory=str(LIMIT))
        places = {"managed": asked.folders, "shared": asked.folders[:1]}
        launcher = {which: asked.launch(programs, places[which], f"storm-{which}") for which in places}
        for which in (*TENANTS, *TENANTS[::-1]):
            before = counts()
            found[which] += asked.times(launcher[which], said[which])
            after = counts()
            after.subtract(before)
            after["not_greeted"] = asked.processes - after["hello_managed"]
            said[which] += after  # without those that are 0


def report(found: dict[str, list[float]], said: dict[str, Counter[str]]) -> int:
    """All lines; 1 where a bar is missed."""
    lines: dict[str, tuple[float, str]] = {}
    held = []
    for percent, bar in ((50, ADDED_P50_MS), (99, ADDED_P99_MS)):
        value = {which: percentile(times, percent) for which, times in found.items()}
        lines |= {f"storm_p{percent}_{which}": (ms, "ms") for which, ms in value.items()}
        for which in TENANTS:
            added = value[which] - value[NATIVE[which]]
            lines[f"storm_p{percent}_{which}_added"] = (added, "ms")
            held.append(added <= bar)
    for which, counted in said.items():
        for name, n in sorted(counted.items()):
            each = name.endswith("_cpu")
            lines[f"storm_{which}_{name}"] = (n / len(found[which]), "ms each") if each else (n, "")
    held += [not said[which]["not_greeted"] for which in TENANTS]
    lines["storm_bars_held"] = (sum(held), f"of {len(held)}")
    record("storm", lines)
    return 0 if all(held) else 1


def main() -> int:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=1, help="each has two storms of each kind")
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    parser.add_argument("--program", type=Path, default=ROOT / "build/bench/storm")
    given = parser.parse_args()
    options = ["--driver-root", given.driver_root, "--shim", str(given.shim)]
    found: dict[str, list[float]] = {which: [] for which in (*NATIVE.values(), *TENANTS)}
    said: dict[str, Counter[str]] = {which: Counter() for which in found}
    try:
        with cgroups(given.processes) as folders:
            asked = Storm(given.processes, given.program, folders)
            for _ in range(given.rounds):
                native(asked, ("native", "together"), found, said)
                managed(asked, options, found, said)
                native(asked, ("together", "native"), found, said)
    except (BenchError, OSError) as error:
        print(f"bench storm: {error}", file=sys.stderr)
        return 1
    return report(found, said)


if __name__ == "__main__":
    sys.exit(main())
