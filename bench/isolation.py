"""Measure what `isolation: own` keeps on a concurrent device: shares beside programs of MPS, and fault isolation.

Each program always has kernels of 2 ms in flight. `own` is a tenant with `isolation: own`, `mps` is a tenant without.
Prints:

    own_share_1_1, own_share_3_1   the part of all launches that `own` did beside `mps`, with these weights
    mps_share_1_1                  the same part of one of two tenants that use MPS
    launches_..._a_second          all launches a second of both programs
    own_fails, mps_fails           how many of three programs ended after a fault in a program of the named kind: one
                                   other program with `isolation: own`, two that use MPS

Needs a real GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from bench.lib.mps import client, concurrent, is_well
from bench.lib.service import FGPU, ROOT, BenchError, end_in_order
from bench.lib.tenants import Program, record

POLICY = """\
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: own}
spec:
  selector: {cgroup: ["**/own-*"]}
  compute: {isolation: own}
"""
FAULT_SECONDS = 3.0


def begun(stack: ExitStack, name: str) -> Program:
    """Start a program, and check that it uses MPS if and only if its name does not begin with "own"."""
    program = client(stack, name)
    if (said := program.hear()) != f"ready {0 if name.startswith('own') else 1}":
        raise BenchError(f"{name} says {said}")
    return program


def share(names: tuple[str, str], weights: tuple[int, int], seconds: float) -> tuple[float, float]:
    """Return the first program's part of all launches, and the launches a second of both."""
    with ExitStack() as stack:
        programs = [begun(stack, name) for name in names]
        for name, weight in zip(names, weights, strict=True):
            subprocess.run([*FGPU, "set", name, "--weight", str(weight * 100)], check=True, timeout=30)
        time.sleep(3)  # until the costs of launches are measured
        counts = [(launches(one), time.monotonic()) for one in programs]
        time.sleep(seconds)
        done = [
            (launches(one) - count) / (time.monotonic() - at) for one, (count, at) in zip(programs, counts, strict=True)
        ]
    return done[0] / sum(done), sum(done)


def launches(program: Program) -> int:
    """Return the number of a program's launches."""
    program.say("count")
    return int(program.hear(10))


def ended(name: str) -> int:
    """Return how many of three programs end after a fault of a program with this name."""
    with ExitStack() as stack:
        others = [begun(stack, other) for other in ("own-1", "mps-1", "mps-2")]
        culprit = begun(stack, name)
        culprit.say("fault")
        time.sleep(FAULT_SECONDS)
        if culprit.process.poll() is None:
            raise BenchError("a kernel that writes to address 8 ends no program")
        return sum(not is_well(other) for other in others)


def measure(seconds: float) -> dict[str, tuple[float, str]]:
    """Return the figures."""
    lines: dict[str, tuple[float, str]] = {}
    cases = {"own_share_1_1": ("own-a", 1), "own_share_3_1": ("own-b", 3), "mps_share_1_1": ("mps-a", 1)}
    for case, (name, weight) in cases.items():
        part, both = share((name, "mps-b"), (weight, 1), seconds)
        lines |= {case: (part, ""), f"launches_{case}_a_second": (both, "")}
        print(f"# {case} {part:.3f}, {both:.0f} launches a second", flush=True)
    return lines | {f"{kind}_fails": (ended(f"{kind}-culprit"), "") for kind in ("own", "mps")}


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each case (default: %(default)s)")
    given = parser.parse_args()
    end_in_order()
    try:
        with concurrent(given.driver_root, given.shim, POLICY):
            record("isolation", measure(given.seconds))
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        print(f"bench isolation: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
