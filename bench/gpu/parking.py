"""The claim `parked`: a torch program is parked by `fgpu park`, and each kind of call wakes it with its data."""

from __future__ import annotations

import ast
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu.claims import PYTHON, Skip, need, say
from bench.lib import nvml
from tests.e2e.parking_kit import becomes, parking
from tests.support.commands import fgpu
from tests.support.host import GIB
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Program, Tenant
from tests.support.wait import eventually

LIMIT, SIZES = 24 * GIB, (1, 8, 20)
SCRIPT = """
import sys, torch
data = [torch.full((1 << 30,), i % 200, dtype=torch.uint8, device="cuda") for i in range(int(sys.argv[1]))]
x, done, graph = torch.zeros(1 << 20, device="cuda"), torch.cuda.Event(enable_timing=True), torch.cuda.CUDAGraph()
with torch.cuda.stream(torch.cuda.Stream()): x += 1
torch.cuda.synchronize()
with torch.cuda.graph(graph): x += 1
done.record()
torch.cuda.synchronize()
def intact(): return all(bool((a == i % 200).all()) for i, a in enumerate(data))
def replay():
    graph.replay()
    torch.cuda.synchronize()
    return True
def silent(value): return True
print("ready", flush=True)
for line in sys.stdin: print(repr(eval(line)), flush=True)
"""
CALLS = {  # what wakes the program: what the call must return
    "silent(torch.cuda.synchronize())": True,
    "done.query()": True,
    "torch.cuda.current_stream().query()": True,
    "silent(done.synchronize())": True,
    "silent(torch.cuda.current_stream().synchronize())": True,
    "torch.cuda.mem_get_info()[1] > 0": True,
    "silent(torch.empty(1 << 29, device='cuda'))": True,
    "float(torch.ones(4).cuda().sum())": 4.0,
    "replay()": True,
    "done.elapsed_time(done) >= 0": True,
    "silent(torch.cuda.empty_cache())": True,
}


class Torch(Program):
    """A torch program that holds `gib` GiB and answers lines of Python."""

    def __init__(self, tenant: Tenant, gib: int) -> None:
        script = tenant.folder / "torch_.py"
        script.write_text(SCRIPT)
        super().__init__(tenant, f"torch{len(tenant._programs)}", f"{PYTHON} {script} {gib}")
        tenant._programs.append(self)
        if self.receive(120) != "ready":
            raise Skip("no torch here")

    def do(self, line: str) -> Any:
        """Run a line, and return its value."""
        self.send(line)
        return ast.literal_eval(self.receive(60))


def _park(one: Tenant) -> float:
    began = time.monotonic()
    fgpu("park", one.name, seconds=120)
    return time.monotonic() - began


def _sizes(one: Tenant, gib: int) -> None:
    """Park and wake a program by hand, and print the times, with those of the driver's calls."""
    program = Torch(one, gib)
    one.assert_exact(10)
    held, before = one.memory()["used_bytes"], nvml.bytes_in_use()
    took = _park(one)
    memory = one.memory()
    need((memory["used_bytes"], memory["parked_bytes"]) == (0, held), f"{gib} GiB: all {held} bytes are parked")
    need(before - nvml.bytes_in_use() >= held - GIB // 4, f"{gib} GiB: the device has them free")
    say(f"park_{gib}gib", f"{took:.2f}", "s")
    began = time.monotonic()
    fgpu("wake", one.name, seconds=120)
    say(f"wake_{gib}gib", f"{time.monotonic() - began:.2f}", "s")
    need(program.do("intact()"), f"{gib} GiB: the data is intact")
    eventually(lambda: one.memory()["used_bytes"] >= held, 5, "the charge")
    program.close()
    eventually(lambda: not one.memory()["used_bytes"], 20, "the end of the program")


def parked(service: Service, place: Place) -> None:
    """Park programs of several sizes, and wake a program by each kind of call."""
    with tempfile.TemporaryDirectory() as folder, parking(service, Path(folder)):
        one = place.tenant(LIMIT)
        one.assert_enforced()
        program = Torch(one, 1)
        for line, value in CALLS.items():
            _park(one)
            becomes(one, "parked")
            time.sleep(0.3)
            began = time.monotonic()
            said = program.do(line)
            took = time.monotonic() - began
            need(said == value, f"{line} wakes it in {took:.2f} s")
        need(program.do("intact()"), "the data is intact")
        program.close()
        eventually(lambda: not one.memory()["used_bytes"], 20, "the end of the program")
        for gib in SIZES:
            _sizes(one, gib)
