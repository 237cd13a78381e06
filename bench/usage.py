"""Measure the error of GPU TIME in `fgpu usage`, relative to the time in which the kernels of a tenant ran.

CUPTI records the kernels of each program, from its first to its last. For each case prints

    usage_LOAD_SOURCE_kernels SECONDS s   the time in which at least one kernel of the tenant ran
    usage_LOAD_SOURCE_error PERCENT %     (GPU TIME - kernels) / kernels

The loads are `busy` (kernels of 1 ms without a pause), `notebook` (4 ms of work, 12 ms of sleep), `train` (a training
that synchronises each step) and `small` (inference of a small model). With the source `nvml` a tenant has no
`compute:`. With the source `turns` it has a ceiling, so that it takes turns while it is alone too. A case with several
loads, LOAD+LOAD, runs them at once in tenants of equal weight, and prints `usage_LOAD_LOAD_SOURCE_N_…` for the Nth.

GPU TIME is the sum over both sources; a comment has each source. Recording makes a launch slower, which affects both
sides of the comparison, except for the pauses between kernels: GPU TIME includes pauses below 0.1 ms, and the comment
has their sum. Writes build/bench/usage.json. Exits with 1 if an error of the source `turns` is above 2 %.
Starts an agent for each case. The agent's store is a separate file system of this process, so that this use is not
added to the host's. Needs a real GPU and CUPTI. TORCH_PYTHON is a Python interpreter with torch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.lib import kernel_times
from bench.lib.service import FGPU, ROOT, BenchError, agent, end_in_order
from bench.lib.tenants import Program, ending, record
from bench.windows import HEAD_START_NS, LIMIT, SLACK_SECONDS, start

LISTEN = "127.0.0.1:19427"
STORE = Path("/var/lib/fgpu")
CLONE_NEWNS = 0x20000
LOADS = {"busy": "k1x4", "notebook": "notebook", "train": "each", "small": "small"}  # by name: kinds of windows_work
CEILING = "90%"
CASES = (*(f"{load} {source}" for load in LOADS for source in ("nvml", "turns")), "busy+train turns")
LAST_SECONDS = 3.0  # from the end of a program until the agent has measured its last turns
BAR_PERCENT = 2.0
MOST_MISSING = 0.001  # this part of the kernels may be without times


@dataclass(frozen=True, slots=True)
class Measured:
    """The use of one tenant: seconds of GPU TIME by source, and its kernels. `figure`: the beginning of its figures."""

    figure: str
    used: dict[str, float]
    ran: kernel_times.Ran

    def error_percent(self) -> float:
        """Return the error of the GPU TIME of all sources."""
        return 100 * (sum(self.used.values()) / self.ran.seconds - 1)


def own_store() -> None:
    """Mount an empty file system over the agent's store, for this process and those that it starts."""
    STORE.mkdir(mode=0o755, parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise BenchError(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
    for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "mode=755", "tmpfs", str(STORE)]):
        subprocess.run(["mount", *command], check=True, timeout=10)


def run(programs: list[Program], loads: list[str], seconds: int) -> None:
    """Let all programs begin their loads at the same moment, and wait for their ends."""
    at = time.monotonic_ns() + HEAD_START_NS
    for program, load in zip(programs, loads, strict=True):
        program.say(f"{LOADS[load]} {seconds} {at}")
    for program in programs:
        program.hear(seconds + SLACK_SECONDS)


def gpu_seconds(tenant: str) -> dict[str, float]:
    """Return the GPU TIME of a tenant in seconds, by source."""
    done = subprocess.run([*FGPU, "usage", "--since", "1d", "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"fgpu usage: {done.stderr.strip()}")
    return {row["source"]: row["run_seconds"] for row in json.loads(done.stdout) if row["tenant"] == tenant}


def measured(case: str, seconds: int, options: list[str], environment: list[str]) -> Iterator[Measured]:
    """Run one case with an agent of its own, and yield the use of each tenant."""
    together, source = case.split()
    loads = together.split("+")
    names = [f"usage-{'-'.join(loads)}-{source}-{number}" for number in range(1, len(loads) + 1)]
    shares = ["--compute", CEILING] if source == "turns" else []
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as policies:
        with agent([*options, "--policies", policies]):
            with ending() as programs:
                for name, load in zip(names, loads, strict=True):
                    recorded = [*environment, f"KERNELS_OUT={out}/{name}"]
                    start(programs, [name], LIMIT, [LOADS[load]], shares, recorded)
                run(programs, loads, seconds)
            time.sleep(LAST_SECONDS)
        for number, name in enumerate(names, 1):
            figure = f"usage_{'_'.join(loads)}_{source}" + (f"_{number}" if len(loads) > 1 else "")
            yield checked(Measured(figure, gpu_seconds(name), kernel_times.ran(Path(out).glob(f"{name}.*"))), source)


def checked(found: Measured, source: str) -> Measured:
    """Print a tenant's use as a comment. Raises BenchError if it is not comparable."""
    by_source = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.used.items())
    ran = found.ran
    kernels = f"{ran.kernels} kernels in {ran.seconds:.2f} s and {ran.short_pauses:.2f} s of short pauses"
    print(f"# {found.figure}: {by_source}; {kernels}, {ran.missing} missing", flush=True)
    if ran.missing > MOST_MISSING * ran.kernels or not ran.seconds:
        raise BenchError(f"{found.figure}: CUPTI has not recorded all kernels")
    if max(found.used, key=lambda name: found.used[name], default="none") != source:
        raise BenchError(f"{found.figure}: most of the use was not measured by {source}")
    return found


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--only", default=",".join(CASES), help=f"of {', '.join(CASES)}, or other combinations")
    parser.add_argument("--seconds", type=int, default=60, help="of each case (60)")
    given = parser.parse_args()
    end_in_order()
    environment = kernel_times.build()
    own_store()
    options = ["--driver-root", given.driver_root, "--shim", str(ROOT / "build/shim/libfgpu.so"), "--listen", LISTEN]
    lines: dict[str, tuple[float, str]] = {}
    above = []
    try:
        for case in given.only.split(","):
            for found in measured(case, given.seconds, options, environment):
                lines[f"{found.figure}_kernels"] = found.ran.seconds, "s"
                lines[f"{found.figure}_error"] = found.error_percent(), "%"
                if case.endswith(" turns") and abs(found.error_percent()) > BAR_PERCENT:
                    above.append(found.figure)
    finally:
        record("usage", lines)  # those of the cases that ended
    if above:
        print(f"# above {BAR_PERCENT:.0f} %: {', '.join(above)}", file=sys.stderr)
    return 1 if above else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench usage: {error}")
