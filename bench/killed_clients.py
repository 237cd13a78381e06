"""Kill programs on a concurrent device with SIGKILL while their kernels run, and count the neighbours that are harmed.

All clients of an MPS server share a context, so without help the kernels of a killed client fault, and the fault ends
the other clients. Prints, after `--kills` kills at random moments beside two other tenants:

    kills                 the number of kills
    neighbours_failed     the number of kills after which a neighbour had an error; the neighbour is then started again
    mps_clients           the number of killed programs that used MPS

Needs a real GPU.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from bench.lib.mps import client, concurrent, is_well
from bench.lib.service import ROOT, BenchError, end_in_order
from bench.lib.tenants import record

WAIT_SECONDS = 0.5  # until the fault of a killed client has reached its neighbours


def measure(kills: int, seed: int) -> dict[str, tuple[float, str]]:
    """Kill clients, and return the figures."""
    dice, failed, clients, number = random.Random(seed), 0, 0, 0
    with ExitStack() as stack:
        neighbours = [client(stack, f"neighbour-{n}") for n in range(2)]
        for neighbour in neighbours:
            if neighbour.hear() != "ready 1":
                raise BenchError("a program on a concurrent device does not use MPS")
        begun = time.monotonic()
        for number in range(1, kills + 1):
            with ExitStack() as victims:
                victim = client(victims, f"victim-{number}")
                clients += victim.hear() == "ready 1"
                time.sleep(dice.uniform(0, 0.2))
                victim.process.send_signal(signal.SIGKILL)
                victim.process.wait(10)
            time.sleep(WAIT_SECONDS if dice.random() < 0.1 else 0.0)
            for place, neighbour in enumerate(neighbours):
                if not is_well(neighbour):
                    failed += 1
                    print(f"# kill {number}: {neighbour.name} failed", flush=True)
                    neighbours[place] = client(stack, f"neighbour-{number}-{place}")
                    neighbours[place].hear()
            if number % 50 == 0:
                print(f"# {number} kills, {failed} neighbours failed, {time.monotonic() - begun:.0f} s", flush=True)
        time.sleep(4)
        failed += sum(not is_well(neighbour) for neighbour in neighbours)
    return {"kills": (number, ""), "neighbours_failed": (failed, ""), "mps_clients": (clients, "")}


def main() -> int:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--shim", type=Path, default=ROOT / "build/shim/libfgpu.so")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    given = parser.parse_args()
    print(f"# seed {given.seed}", flush=True)
    end_in_order()
    try:
        with concurrent(given.driver_root, given.shim):
            record("killed_clients", measure(given.kills, given.seed))
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        print(f"bench killed_clients: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
