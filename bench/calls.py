"""Measure how much memory each kind of allocation call gets under a limit, in steps of 2 MiB.

For each kind of call, one program requests up to three times its limit. The calls are those of the driver and of the
CUDA runtime, and both in the variant of programs that are built with a per-thread default stream (`thread`).
bench/lib/fill_calls.py has the list. Up to --at-once programs run at a time, each in a tenant.

Prints `API_KIND_usable PERCENT %`, the memory that the program got, as a part of its limit minus its context. For
graphs these are the driver's bytes, and the requested bytes are printed too. Also prints bytes beyond the limit if
there are any, by the program or by the ledger, and the driver's error if it was not out-of-memory. Prints
`runtime absent` if there is no libcudart. Writes build/bench/calls.json. Exits with 1 if a kind of call got less than
99.5 % of that memory, got bytes beyond the limit (pools and graphs: more than 38 MiB), or was never refused. Starts and
stops the agent. TORCH_PYTHON is a Python interpreter with packages that may contain libcudart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from bench.lib.cudart import libcudart
from bench.lib.fill_calls import COMBINATIONS, THREADED
from bench.lib.service import ROOT, BenchError, agent
from bench.lib.tenants import Program, ending, memory_of

OUT_OF_MEMORY = 2
ENOUGH_PERCENT = 99.5
LAST_BLOCK = 38 << 20  # the maximum bytes beyond the limit: the last block of a pool or graph may be larger
RECONCILED_SECONDS = 1.2  # two reconciles
SCRIPT = str(ROOT / "bench/lib/fill_calls.py")
PYTHON = os.environ.get("TORCH_PYTHON", "python3")


def one(combination: tuple[str, str], limit: int, runtime: str) -> dict[str, float]:
    """Run a tenant that fills its limit by one kind of call. Return the figures."""
    name = "_".join(combination)
    with ending() as programs:
        programs.append(Program([sys.executable, SCRIPT, *combination, str(limit), runtime], limit, f"calls-{name}"))
        said = json.loads(programs[0].hear())
        if "error" in said:
            raise BenchError(f"{name}: {said['error']}")
        time.sleep(RECONCILED_SECONDS)
        device = memory_of(programs[0].name)
    taken = max(said["got_bytes"], said.get("taken_bytes", 0))
    return {
        "usable_percent": 100 * taken / said["usable_bytes"],
        "asked_percent": 100 * said["got_bytes"] / said["usable_bytes"],
        "code": said["code"],
        "beyond": max(0, taken - said["usable_bytes"], device["used_bytes"] - limit),
        "allowed": LAST_BLOCK if combination[1] in THREADED else 0,
        "drift": device["drift_bytes"],
    }


def held(found: dict[str, float]) -> bool:
    """Return whether the program got at least ENOUGH_PERCENT of its usable memory, no more, and then out-of-memory."""
    is_filled = found["usable_percent"] >= ENOUGH_PERCENT
    return is_filled and found["code"] == OUT_OF_MEMORY and found["beyond"] <= found["allowed"]


def say(name: str, found: dict[str, float]) -> None:
    """Print the figures of one kind of call: the usable part, and other figures only if they are unexpected."""
    print(f"{name}_usable {found['usable_percent']:.2f} %", flush=True)
    if found["asked_percent"] < found["usable_percent"]:
        print(f"{name}_asked_for {found['asked_percent']:.2f} %")
    if found["code"] != OUT_OF_MEMORY:
        print(f"{name}_end {found['code']:.0f} CUresult")
    if found["beyond"]:
        print(f"{name}_beyond_limit {found['beyond']} bytes")
    if found["drift"]:
        print(f"{name}_drift {found['drift']} bytes")


def main() -> int:
    """Measure all kinds of calls. Return 1 if a kind was never refused, exceeded its limit or could not fill it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, default=1 << 30, help="bytes")
    parser.add_argument("--at-once", type=int, default=6, help="tenants")
    parser.add_argument("--runtime", help="the CUDA runtime's library, if not the one that is found")
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    given = parser.parse_args()
    given.runtime = given.runtime or libcudart(PYTHON, given.driver_root)
    wanted = [c for c in COMBINATIONS if given.runtime or not c[0].startswith("runtime")]
    if not given.runtime:
        print("runtime absent")
    found: dict[str, dict[str, float]] = {}
    fill = partial(one, limit=given.limit, runtime=given.runtime or "")
    try:
        with (
            agent(["--driver-root", given.driver_root, "--shim", str(given.shim)]),
            ThreadPoolExecutor(given.at_once) as threads,
        ):
            for combination, result in zip(wanted, threads.map(fill, wanted), strict=True):
                name = "_".join(combination)
                found[name] = result
                say(name, result)
    except (BenchError, OSError, ValueError) as error:
        print(f"bench calls: {error}", file=sys.stderr)
        return 1
    out = ROOT / "build/bench/calls.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    count = sum(map(held, found.values()))
    print(f"calls_held {count} of {len(found)}")
    return 0 if count == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
