"""Measure how long a change of a limit takes until a running program has it.

Prints `live_HOW_WHAT_pNN VALUE ms` for --changes of each kind, and writes build/bench/live.json. Exits with 1 if a bar
is missed. Starts and stops the agent. HOW is the method of the change:

    typed     `fgpu set`, measured from before the start of its process
    request   the request of `fgpu set` on the control socket
    unset     the request of `fgpu unset` on the control socket, after which a policy applies again
    file      a new policy file
    reload    a new policy file, and at once a reload by a request on the control socket
    hangup    a new policy file, and at once SIGHUP to the agent

WHAT is `visible`, when cuMemGetInfo shows the new total, or `held`, when the first allocation of 16 MiB is refused or
admitted again. The program checks both in turn, with a pause of 20 us.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.lib.service import FGPU, ROOT, BenchError, agent, percentile
from bench.lib.tenants import Program, ask, ending, record, service_pids

LISTEN = "127.0.0.1:19426"
MIB = 1 << 20
LOW, HIGH = 1024, 1088  # MiB; with LOW, the program has less than 16 MiB left
BAR_MS = 100.0
NAME, TARGET = "live", "/fgpu/live"
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: live}}
spec:
  selector: {{cgroup: ["fgpu/live"]}}
  memory: {{limit: {0}MiB}}
"""
Change = Callable[[int], object]


class Host:
    """The ways to change a limit. Each method has the new limit in MiB as its argument."""

    def __init__(self, policies: Path) -> None:
        self._policies = policies
        self._agent = service_pids()["agent"]

    def typed(self, mib: int) -> None:
        """Run `fgpu set` and wait for its end."""
        subprocess.run([*FGPU, "set", TARGET, "--memory", f"{mib}MiB"], check=True, capture_output=True, timeout=30)

    def request(self, mib: int) -> None:
        """Send the request of `fgpu set` to the control socket."""
        ask(verb="put", target=TARGET, memory=f"{mib}MiB")

    def unset(self, mib: int) -> None:
        """Set LOW by a request. For HIGH, remove that limit, so that the policy's limit applies."""
        if mib == LOW:
            self.request(LOW)
        else:
            ask(verb="drop", target=TARGET)

    def file(self, mib: int) -> None:
        """Replace the policy file by rename(2), as editors and Kubernetes do."""
        put(self._policies, mib)

    def reload(self, mib: int) -> None:
        """Replace the policy file and send the request of `fgpu reload`, without its process."""
        self.file(mib)
        ask(verb="reload")

    def hangup(self, mib: int) -> None:
        """Replace the policy file and send SIGHUP, as `systemctl reload fgpu-agent` does."""
        self.file(mib)
        os.kill(self._agent, signal.SIGHUP)


def put(folder: Path, mib: int) -> None:
    """Write the policy with this limit to its folder, by rename(2)."""
    aside = folder / ".live"
    aside.write_text(POLICY.format(mib), encoding="utf-8")
    aside.rename(folder / "live.yaml")


def watched(program: Program, change: Change, mib: int) -> tuple[float, float]:
    """Make one change. Return the milliseconds until it is visible, and until it is held."""
    program.say(f"{mib * MIB} {int(mib == HIGH)}")
    time.sleep(0.005)  # until the program has begun to check
    begun = time.monotonic_ns()
    change(mib)
    said = program.hear()
    if said.startswith("-"):
        raise BenchError(f"{change.__name__}: {said}")
    visible, held = ((int(at) - begun) / 1e6 for at in said.split())
    return visible, held


def measure(program: Program, change: Change, changes: int, only: int = 0) -> dict[str, float]:
    """Make changes to HIGH and LOW in turn, and return the median and the 99th percentile of their times.

    Args:
        program: the running program.
        change: the method of Host that makes the change.
        changes: the minimum number of measured changes.
        only: measure only changes to this limit, in MiB; 0: all.

    Returns:
        Milliseconds, by `live_HOW_WHAT_pNN`.
    """
    times: list[tuple[float, float]] = []
    while len(times) < changes:
        for mib in (HIGH, LOW):
            took = watched(program, change, mib)
            times += [took] if only in (0, mib) else []
    found = {}
    for what, taken in zip(("visible", "held"), zip(*times, strict=True), strict=True):
        for percent in (50, 99):
            found[f"live_{change.__name__}_{what}_p{percent}"] = percentile(list(taken), percent)
    return found


def run(policies: Path, changes: int) -> dict[str, float]:
    """Measure all methods of Host. Limits set by hand are measured first: they have precedence over the policy."""
    host = Host(policies)
    with ending() as programs:
        programs.append(Program([str(ROOT / "build/bench/live")], LOW * MIB, NAME))
        if (said := programs[0].hear()) != "ready":
            raise BenchError(f"live: {said}")
        found: dict[str, float] = {}
        for change in (host.typed, host.request):
            found |= measure(programs[0], change, changes)
        found |= measure(programs[0], host.unset, changes, only=HIGH)
        ask(verb="drop", target=TARGET)
        for change in (host.file, host.reload, host.hangup):
            found |= measure(programs[0], change, changes)
    return found


def report(found: dict[str, float]) -> int:
    """Print all figures and the missed bars. Return 1 if there are any."""
    record("live", {name: (value, "ms") for name, value in found.items()})
    missed = [name for name, value in found.items() if name.endswith("_p99") and value > BAR_MS]
    for name in missed:
        print(f"{name}: bar {BAR_MS:g} ms MISSED")
    return 1 if missed else 0


def main() -> int:
    """Read the command line, measure and print. Return 0 if every bar is held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", default=str(ROOT / "build/shim/libfgpu.so"))
    parser.add_argument("--changes", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        policies = Path(folder, "policy.d")
        policies.mkdir()
        put(policies, HIGH)
        options = ["--driver-root", given.driver_root, "--shim", given.shim, "--listen", LISTEN]
        try:
            with agent([*options, "--policies", str(policies)]):
                return report(run(policies, given.changes))
        except (BenchError, OSError) as error:
            print(f"bench live: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
