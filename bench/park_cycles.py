"""Parks and wakes eight tenants all the time, and compares their data: `python -m bench.park_cycles [--seconds N]`.

Two tenants each of torch (the work is a CUDA graph), CuPy, JAX and the driver alone hold memory. For each tenant, a
thread parks it with `fgpu park`, waits for a random time, and lets its program check the data and change them: the
call wakes the tenant. Every fourth tenant is woken by `fgpu wake` before that. A refusal, as for a thread that is in a
call of the driver, is counted and tried again.

Needs root, a GPU with driver 570 or later, and the packages of the frameworks; a framework that is missing is left out.
The last line has the counts. Exits with 1 if a tenant had no cycle, a program ended, data were wrong, or a ledger and
the driver disagree.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.gpu.check import host
from bench.gpu.claims import PYTHON, say
from bench.lib.service import end_in_order
from tests.e2e.parking_kit import parking, state
from tests.support.commands import fgpu
from tests.support.host import GIB
from tests.support.tenant import Program, Tenant
from tests.support.wait import eventually

LIMIT, HELD = 6 * GIB, GIB // 4
BEGIN = f"""
import sys
SIZE = {HELD}
"""
# Each defines ends(), which returns the smallest and the largest byte of the data, and fill(n), which sets them all.
FRAMEWORKS = {
    "torch": """
import torch
data, value = torch.zeros(SIZE, dtype=torch.uint8, device="cuda"), torch.zeros((), dtype=torch.uint8, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.stream(torch.cuda.Stream()): data.copy_(value.expand(SIZE))
torch.cuda.synchronize()
with torch.cuda.graph(graph): data.copy_(value.expand(SIZE))
def ends(): return int(data.min()), int(data.max())
def fill(n):
    value.fill_(n)
    graph.replay()
    torch.cuda.synchronize()
""",
    "cupy": """
import cupy
data = cupy.zeros(SIZE, dtype=cupy.uint8)
def ends(): return int(data.min()), int(data.max())
def fill(n):
    data.fill(n)
    cupy.cuda.Device().synchronize()
""",
    "jax": """
import os
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
import jax, jax.numpy as jnp
data = jnp.zeros(SIZE, dtype=jnp.uint8).block_until_ready()
def ends(): return int(data.min()), int(data.max())
def fill(n):
    global data
    data = jnp.full(SIZE, n, dtype=jnp.uint8).block_until_ready()
""",
    "driver": """
import ctypes as C
L = C.CDLL("libcuda.so.1")
def need(name, *arguments):
    result = getattr(L, name)(*arguments)
    if result: raise SystemExit(f"{name}: {result}")
context, pointer, back = C.c_void_p(), C.c_uint64(), C.create_string_buffer(SIZE)
need("cuInit", 0)
need("cuCtxCreate_v2", C.byref(context), 0, 0)
need("cuMemAlloc_v2", C.byref(pointer), C.c_size_t(SIZE))
def ends():
    need("cuMemcpyDtoH_v2", back, pointer, C.c_size_t(SIZE))
    first = back.raw[0]
    return (first, first) if back.raw.count(first) == SIZE else (min(back.raw), max(back.raw))
def fill(n):
    need("cuMemsetD8_v2", pointer, n, C.c_size_t(SIZE))
    need("cuCtxSynchronize")
""",
}
END = """
fill(0)
print("ready", flush=True)
for line in sys.stdin:
    n = int(line)
    found = ends()
    fill((n + 1) % 251)
    print("intact" if found == (n % 251, n % 251) else f"wrong {found}", flush=True)
"""


class Cycles(threading.Thread):
    """The thread of one tenant, which parks it and lets it wake until the time is over.

    Args:
        kind: a key of FRAMEWORKS.
        seconds: the time from the thread's start until its end.
        by_hand: the tenant is woken by `fgpu wake` before each call.
    """

    def __init__(self, tenant: Tenant, kind: str, seconds: float, seed: int, by_hand: bool) -> None:
        super().__init__(daemon=True)
        self._tenant, self._seconds, self._random, self._by_hand = tenant, seconds, random.Random(seed), by_hand
        script = tenant.folder / f"{kind}_.py"
        script.write_text(BEGIN + FRAMEWORKS[kind] + END)
        self._program = Program(tenant, kind, f"{PYTHON} {script}")
        tenant._programs.append(self._program)
        self._number = 0  # of the program's next check
        self.kind, self.cycles, self.fault = kind, 0, ""
        self.refusals = collections.Counter[str]()
        self.waits: list[float] = []

    def is_ready(self) -> bool:
        """Wait until the program has its data. Return False if it does not get that far."""
        return self._program.receive(180) == "ready"

    def run(self) -> None:
        """Repeat cycles. An error ends them, and is kept in `fault`."""
        until = time.monotonic() + self._seconds
        try:
            while time.monotonic() < until and not self.fault:
                self._cycle()
        except Exception as error:
            self.fault = f"{type(error).__name__}: {error}"

    def _cycle(self) -> None:
        done = fgpu("park", self._tenant.name, check=False, seconds=120)
        if done.returncode:
            self.refusals[re.sub(r"[0-9.]+", "N", done.stderr.strip())[:160]] += 1
        elif state(self._tenant) != "parked":
            self.refusals["woken before it was looked at"] += 1
        else:
            self.cycles += 1
        time.sleep(self._random.random() * 0.5)
        if self._by_hand and not done.returncode:
            fgpu("wake", self._tenant.name, seconds=120)
        began = time.monotonic()
        self._program.send(str(self._number))
        answer = self._program.receive(120)
        self.waits.append(time.monotonic() - began)
        if answer != "intact":
            self.fault = answer
        self._number += 1
        time.sleep(self._random.random() * 0.2)


def _resident_mib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4 // 1024


def main() -> int:
    """Run the cycles, and print the counts. Return 1 if anything was lost, wrong, not equal or never done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    end_in_order()
    with host() as (service, place), tempfile.TemporaryDirectory() as folder, parking(service, Path(folder)):
        kinds = [kind for kind in FRAMEWORKS if kind == "driver" or not _lacks(kind)]
        tenants = [place.tenant(LIMIT) for _ in range(8)]
        all_ = [
            Cycles(tenant, kinds[n % len(kinds)], options.seconds, options.seed + n, n % 4 == 3)
            for n, tenant in enumerate(tenants)
        ]
        assert all(each.is_ready() for each in all_), "a program did not begin"
        assert service.agent
        before_mib, began = _resident_mib(service.agent.pid), time.monotonic()
        for each in all_:
            each.start()
        for each in all_:
            each.join(options.seconds + 300)
        for each, tenant in zip(all_, tenants, strict=True):
            calls = f"; call p50 {statistics.median(each.waits):.2f} s" if each.waits else ""
            say(f"{each.kind}_{tenant.name}", each.cycles, f"cycles{calls}")
            each.fault = each.fault or ("" if each.cycles else "no cycle")
            for why, count in each.refusals.items():
                print(f"  {count} x {why}")
            if each.fault:
                print(f"  FAULT {each.fault}: {each._program.complaints()[-300:]}")
        for tenant in tenants:
            fgpu("wake", tenant.name, check=False, seconds=120)
        drifts = [tenant for tenant in tenants if not _agrees(tenant)]
        cycles, faults = sum(each.cycles for each in all_), [each for each in all_ if each.fault or each.is_alive()]
        grew = _resident_mib(service.agent.pid) - before_mib
        seconds = time.monotonic() - began
        print(f"seed {options.seed}: {cycles} cycles in {seconds:.0f} s, {len(faults)} tenants with a fault, "
              f"{len(drifts)} with a drift; the agent grew by {grew} MiB from {before_mib} MiB")  # fmt: skip
    return 1 if faults or drifts else 0


def _lacks(module: str) -> bool:
    return bool(subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, check=False).returncode)


def _agrees(tenant: Tenant) -> bool:
    try:
        eventually(lambda: not tenant.memory()["drift_bytes"], 10, "no drift")
    except AssertionError:
        print(f"  {tenant.name}: {tenant.memory()}")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
