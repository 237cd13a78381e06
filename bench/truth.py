"""Compare the ledger with the driver, for programs of several frameworks that run at once, each in a tenant.

One second after every phase of a program (bench/lib/phases.py), the ledger's bytes of the tenant are compared with the
bytes that NVML shows for its processes. The agent has corrected the ledger by NVML's bytes meanwhile. Therefore the
tenant's witnessed bytes must also have grown by the bytes that the program has certainly allocated in the phase. Growth
of a pool has no probe: then the admitted bytes must have grown.

Prints `truth_PROGRAM_PHASE BYTES bytes`, ledger minus NVML, and `truth_PROGRAM_worst PERCENT %`, the largest difference
as a part of the limit. If a program could not run, prints `truth_PROGRAM` with `absent` or `failed` and the reason.
Writes build/bench/truth.json. Exits with 1 if a difference is above the bar or a program failed. Starts and stops the
agent. TORCH_PYTHON is a Python interpreter with the frameworks (default: python3).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pynvml

from bench.lib import nvml
from bench.lib.phases import FRAMEWORKS
from bench.lib.service import ROOT, BenchError, agent
from bench.lib.tenants import Program, cgroup_root, ending, memory_of, record

BAR_PERCENT = 1.0
AFTER_SECONDS = 1.0
PYTHON = os.environ.get("TORCH_PYTHON", "python3")
OWN = ("pool", "vmm")


@dataclass(frozen=True, slots=True)
class Phase:
    """The bytes of the ledger and of NVML after one phase."""

    name: str
    ledger: int
    nvml: int


def nvml_bytes(tenant: str) -> int:
    """Return the bytes that NVML shows for the processes in a tenant's cgroup, on device 0."""
    return nvml.bytes_of(nvml.pids_of(cgroup_root() / "fgpu" / tenant))


def phases(program: Program) -> list[Phase] | str:
    """Return every phase of one program, or an error text that begins with "absent" or "failed". Does not raise."""
    try:
        return _phases(program)
    except (BenchError, OSError, ValueError, pynvml.NVMLError) as error:
        return f"failed: {error}"


def _phases(program: Program) -> list[Phase] | str:
    """Return every phase of one program, or why its framework is absent.

    Raises BenchError if NVML shows less memory than the program certainly holds, so that no comparison is possible, or
    if probes or admissions have recorded less memory than the program has certainly allocated in a phase.
    """
    found: list[Phase] = []
    least, before = 0, {"admitted_bytes": 0, "witnessed_bytes": 0}
    while True:
        program.say("")
        said = json.loads(program.hear())
        if "absent" in said:
            return f"absent: {said['absent']}"
        if "end" in said:
            return found
        time.sleep(AFTER_SECONDS)
        memory, shown = memory_of(program.name), nvml_bytes(program.name)
        if shown < said["least"]:
            raise BenchError(f"{said['phase']}: NVML shows {shown} of {said['least']} bytes")
        recorded = "admitted_bytes" if said["is_pool"] else "witnessed_bytes"
        grown, allocated = memory[recorded] - before[recorded], said["least"] - least
        if grown < allocated:
            raise BenchError(f"{said['phase']}: {recorded} grew by {grown} of {allocated} bytes")
        least, before = said["least"], memory
        found.append(Phase(said["phase"], memory["used_bytes"], shown))


def measure(names: list[str], given: argparse.Namespace) -> dict[str, list[Phase] | str]:
    """Run all programs at the same time. Return the phases or the error of each, by its name."""
    script = str(ROOT / "bench/lib/phases.py")
    options = ["--driver-root", given.driver_root, "--shim", str(given.shim)]
    with agent(options), ending() as programs, ThreadPoolExecutor(len(names)) as threads:
        for name in names:
            python = sys.executable if name in OWN else PYTHON
            programs.append(Program([python, script, name], given.limit, f"truth-{name}"))
        return dict(zip(names, threads.map(phases, programs), strict=True))


def report(found: dict[str, list[Phase] | str], limit: int) -> int:
    """Print all figures. Return 1 if a bar is missed or a program failed."""
    lines: dict[str, tuple[float, str]] = {}
    worst: list[float] = []
    failed = 0
    for name, said in found.items():
        if isinstance(said, str):
            print(f"truth_{name} {said}")
            failed += said.startswith("failed")
            continue
        lines |= {f"truth_{name}_{phase.name}": (phase.ledger - phase.nvml, "bytes") for phase in said}
        worst.append(100 * max(abs(phase.ledger - phase.nvml) for phase in said) / limit)
        lines[f"truth_{name}_worst"] = (worst[-1], "%")
    held = sum(percent <= BAR_PERCENT for percent in worst)
    lines["truth_bars_held"] = (held, f"of {len(worst) + failed}")
    record("truth", lines)
    return 0 if held == len(worst) and not failed else 1


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="*", default=list(FRAMEWORKS), help=f"of {', '.join(FRAMEWORKS)}")
    parser.add_argument("--limit", type=int, default=4 << 30, help="bytes, of each")
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    given = parser.parse_args()
    try:
        pynvml.nvmlInit()
        found = measure(given.programs, given)
    except (BenchError, OSError, pynvml.NVMLError) as error:
        print(f"bench truth: {error}", file=sys.stderr)
        return 1
    return report(found, given.limit)


if __name__ == "__main__":
    sys.exit(main())
