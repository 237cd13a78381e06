"""Measure the shares of a device's time that programs get, by the work that they complete and count themselves.

Prints `compute_WHAT VALUE UNIT` for every case, with its bar and the result, then how long the case took. If a case
fails or cannot run on this machine, the reason is printed and the next case runs. Writes build/bench/compute.json.
Exits with 1 if a bar is missed or a case failed. Starts and stops the agent. TORCH_PYTHON is a Python interpreter with
torch (default: python3).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.lib import faults, splits, trainings
from bench.lib.service import ROOT, BenchError, agent, end_in_order
from bench.lib.shares import Bench, Skip, options

LISTEN = "127.0.0.1:19425"
Case = Callable[[Bench], None]
# Ordered by the number of programs that a case needs, because the programs of a case stay for the next case.
CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        splits.launch,
        splits.under_limit,
        splits.limit,
        splits.idle,
        splits.small,
        splits.pairs,
        splits.step,
        splits.gatekeeper,
        splits.wide,
        faults.killed,
        faults.stopped,
        faults.gatekeeper_killed,
        faults.scrape,
        faults.capture,
        faults.gang,
        trainings.train,
        trainings.unfilled,
        trainings.lending,
        trainings.inference,
        trainings.train_step,
        trainings.torch_capture,
        trainings.nccl,
    )
}


def one(bench: Bench, name: str) -> bool:
    """Run a case. If the case fails, end all programs and return False."""
    begun = time.monotonic()
    try:
        CASES[name](bench)
        said = "done"
    except Skip as why:
        said = f"skipped: {why}"
    except Exception as error:  # any error, because the next case does not depend on this one
        said = f"FAILED: {type(error).__name__}: {error}"
        bench.end()
    print(f"# case {name}: {said}, {time.monotonic() - begun:.1f} s", flush=True)
    return not said.startswith("FAILED")


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    options(parser, ROOT)
    given = parser.parse_args()
    given.seconds = given.seconds or (2.0 if given.quick else 10.0)
    names = given.only.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"no case {', '.join(unknown)}")
    bench = Bench(given)
    failed = []
    end_in_order()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        given.policies = Path(folder, "policy.d")
        given.policies.mkdir()
        given.listen = LISTEN
        command = ["--driver-root", given.driver_root, "--shim", str(given.shim), "--listen", LISTEN]
        try:
            with agent([*command, "--policies", str(given.policies)]):
                try:
                    failed = [name for name in names if not one(bench, name)]
                finally:
                    bench.end()
        except (BenchError, OSError) as error:
            print(f"bench compute: {error}", file=sys.stderr)
            return 1
    bench.lines["compute_bars_missed"] = (len(bench.missed), " ".join(bench.missed))
    bench.lines["compute_cases_failed"] = (len(failed), " ".join(failed))
    bench.lines["compute_took"] = (time.monotonic() - begun, "s")
    for name, (value, unit) in list(bench.lines.items())[-3:]:
        print(f"{name} {value:.4g} {unit}")
    out = ROOT / "build/bench/compute.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({name: {"value": v, "unit": u} for name, (v, u) in bench.lines.items()}, indent=1) + "\n")
    return 1 if bench.missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())
