"""The claims `parked`, `sizes`, `idle`, `room`, `full` and `deadline`.

`parked`: a torch program is parked by `fgpu park`, and each kind of call wakes it with its data. `sizes`: the time to
park and wake programs of several sizes, beside that of the driver's functions alone. `idle`: programs are parked by
their policy when they are idle, and only then. `room`: two tenants that do not fit on the device use it in turn.
`full`: a request that finds the device full waits while an idle tenant is parked for it. `deadline`: such a
request fails at the deadline of its policy.
"""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.claims import PYTHON, Skip, need, say
from bench.lib import nvml
from tests.e2e.parking_kit import becomes, parking, state
from tests.support.commands import fgpu
from tests.support.host import GIB
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Program, Tenant
from tests.support.wait import eventually

LIMIT, LARGE, SIZES = 24 * GIB, 70 * GIB, (1, 8, 20, 60)
# Parks and wakes the process argv[1] by the driver's functions alone, and prints the seconds of each.
BARE = """
import sys, time
from pathlib import Path
from fgpu_ebpf.parker.cuda import Libcuda
driver, pid = Libcuda(Path("libcuda.so.1")), int(sys.argv[1])
times = []
for call in (lambda: driver.lock(pid, 5000), lambda: driver.checkpoint(pid), lambda: driver.restore(pid),
             lambda: driver.unlock(pid)):
    began = time.monotonic()
    call()
    times.append(time.monotonic() - began)
print(*times)
"""
REST = """
import sys, torch
kept = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("ready", flush=True)
sys.stdin.read()
"""
TOUCH = """
import ctypes, mmap, sys
size = int(sys.argv[1])
memory = mmap.mmap(-1, size)
ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1, size)
"""
AFTER, HELD, DEADLINE = 10, 8, 2
STAYS = 14  # a tenant stays for 10 s after the agent last saw it busy, which is up to 2 s after the end of its work
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: idle}}
spec: {{selector: {{cgroup: ["{paths}"]}}, memory: {{limit: {limit}B, park: {{after: {after}}}}}}}
"""
SCRIPT = """
import ctypes as C, sys, threading, torch
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
driver, at, pinned = C.CDLL("libcuda.so.1"), C.c_uint64(), (C.c_int * 8)(1, 0, 1)
def result(call, size):
    if call == "cuMemAlloc": found, free = driver.cuMemAlloc_v2(C.byref(at), size), driver.cuMemFree_v2
    if call == "cuMemCreate":
        found, free = driver.cuMemCreate(C.byref(at), size, pinned, C.c_uint64()), driver.cuMemRelease
    if call == "cuMemAllocAsync":
        found = driver.cuMemAllocAsync(C.byref(at), size, None)
        free = lambda pointer: driver.cuMemFreeAsync(pointer, None) or driver.cuStreamSynchronize(None)
    return found or free(at)
def sleeps(seconds): torch.cuda._sleep(int(seconds * 1e9))
def launched(seconds): return silent(sleeps(seconds))
def waiting(seconds):
    def run():
        sleeps(seconds)
        torch.cuda.synchronize()
    threading.Thread(target=run, daemon=True).start()
    return True
def trained():
    global x
    x = x * 0.5 + 1
    return True
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

    def do(self, line: str, seconds: float = 60) -> Any:
        """Run a line, and return its value."""
        self.send(line)
        return ast.literal_eval(self.receive(seconds))


def _park(one: Tenant) -> float:
    began = time.monotonic()
    fgpu("park", one.name, seconds=120)
    return time.monotonic() - began


def _bare(work: Path, gib: int) -> tuple[float, float]:
    """Return the seconds in which the driver's functions alone park and wake a program that has no limit."""
    script = work / "bare.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([PYTHON, script, str(gib)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bare:
        try:
            assert bare.stdin
            assert bare.stdout
            assert bare.stdout.readline() == "ready\n"
            python = os.environ.get("PYTHON", sys.executable)
            said = subprocess.run(
                [python, "-c", BARE, str(bare.pid)], capture_output=True, text=True, check=True, timeout=150
            ).stdout
            bare.stdin.write("intact()\n")
            bare.stdin.close()
            need(bare.stdout.readline() == "True\n", f"{gib} GiB, the driver alone: the data is intact")
        finally:
            bare.kill()  # while it is parked, it does not exit at the end of its stdin
    lock, checkpoint, restore, unlock = map(float, said.split())
    return lock + checkpoint, restore + unlock


def _size(one: Tenant, work: Path, gib: int) -> None:
    """Park and wake a program by hand, and print the times, with those of the driver's functions."""
    bare = _bare(work, gib)
    program = Torch(one, gib)
    eventually(lambda: one.memory()["used_bytes"] > gib * GIB and not one.memory()["drift_bytes"], 10, "no drift")
    held, before = one.memory()["used_bytes"], nvml.bytes_in_use()
    took = _park(one)
    memory = one.memory()
    need((memory["used_bytes"], memory["parked_bytes"]) == (0, held), f"{gib} GiB: all {held} bytes are parked")
    need(before - nvml.bytes_in_use() >= held - GIB // 4, f"{gib} GiB: the device has them free")
    say(f"park_{gib}gib", f"{took:.2f}", f"s; the driver alone {bare[0]:.2f}; {held / took / 1e9:.2f} GB/s")
    began = time.monotonic()
    fgpu("wake", one.name, seconds=120)
    took = time.monotonic() - began
    say(f"wake_{gib}gib", f"{took:.2f}", f"s; the driver alone {bare[1]:.2f}; {held / took / 1e9:.2f} GB/s")
    need(program.do("intact()"), f"{gib} GiB: the data is intact")
    eventually(lambda: one.memory()["used_bytes"] >= held, 5, "the charge")
    program.close()
    eventually(lambda: not one.memory()["used_bytes"], 20, "the end of the program")


def parked(service: Service, place: Place) -> None:
    """Park a program, and wake it by each kind of call."""
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


def sizes(service: Service, place: Place) -> None:
    """Park and wake programs of several sizes. The host's memory is used once before, as a busy host's is."""
    subprocess.run([PYTHON, "-c", TOUCH, str(LARGE)], check=True, timeout=100)
    with tempfile.TemporaryDirectory() as folder, parking(service, Path(folder)):
        one = place.tenant(LARGE)
        one.assert_enforced()
        for gib in SIZES:
            _size(one, Path(folder), gib)


def _parks(tenants: dict[str, Tenant]) -> dict[str, int]:
    """Return how often each tenant was parked."""
    return {name: tenant.view()["parking"]["parks"] for name, tenant in tenants.items()}


def _under_policy(
    service: Service, place: Place, names: tuple[str, ...], after: str, limit: int = LIMIT
) -> dict[str, Tenant]:
    """Return new tenants, by name, with this limit in bytes, under a policy that parks them."""
    tenants = {name: place.tenant(limit) for name in names}
    for tenant in tenants.values():
        tenant.assert_enforced()
        fgpu("unset", tenant.path)
    paths = '", "'.join(tenant.path for tenant in tenants.values())
    (service.policies / "policy.yaml").write_text(POLICY.format(paths=paths, limit=limit, after=after))
    fgpu("reload")
    for tenant in tenants.values():
        tenant.assert_enforced()
    return tenants


@contextlib.contextmanager
def _all_but(free: int) -> Iterator[None]:
    """Have a program without a limit hold the device's memory except these bytes."""
    rest = str(nvml.bytes_in_all() - nvml.bytes_in_use() - free)
    with subprocess.Popen([PYTHON, "-c", REST, rest], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holds:
        assert holds.stdout
        need(holds.stdout.readline() == b"ready\n", f"a program holds all but {free} bytes")
        try:
            yield
        finally:
            holds.terminate()


def room(service: Service, place: Place) -> None:
    """Let a program without a limit hold most of the device, and two tenants of 20 GiB use the rest in turn."""
    with tempfile.TemporaryDirectory() as folder, parking(service, Path(folder), "park"):
        tenants = [*_under_policy(service, place, ("first", "second"), "1h").values()]
        with _all_but(30 * GIB):
            pair = [(tenants[0], Torch(tenants[0], 20))]
            _park(tenants[0])
            pair.append((tenants[1], Torch(tenants[1], 20)))
            for _ in range(4):
                (tenant, program), (other, _) = pair
                began = time.monotonic()
                need(program.do("intact()", 120), "a call wakes it with its data")
                say("switch", f"{time.monotonic() - began:.1f}", "s, 10 s of which the other tenant stays")
                need((state(tenant), state(other)) == ("running", "parked"), "the other one is parked")
                pair.reverse()


def full(service: Service, place: Place) -> None:
    """Let a tenant request 12 GiB of the 30 GiB that others leave free, of which an idle tenant holds 20 GiB."""
    with tempfile.TemporaryDirectory() as folder, parking(service, Path(folder), "park"):
        first, second = _under_policy(service, place, ("first", "second"), "1h").values()
        with _all_but(30 * GIB):
            holds, asks = Torch(first, 20), Torch(second, 1)
            for number, call in enumerate(("cuMemAlloc", "cuMemCreate", "cuMemAllocAsync"), 1):
                line = f"result('{call}', C.c_size_t({12 * GIB}))"
                need(holds.do("intact()"), "the other tenant is busy")
                began = time.monotonic()
                need(asks.do(line) == 2, f"{call}: refused")
                say("refused_after", f"{time.monotonic() - began:.2f}", "s")
                time.sleep(STAYS)
                began = time.monotonic()
                need(asks.do(line, 120) == 0, f"{call}: has its memory")
                say("waited", f"{time.monotonic() - began:.1f}", "s")
                seen = first.view()["parking"]
                need((seen["state"], seen["parks"]) == ("parked", number), "the other tenant is parked")
                need(holds.do("intact()", 120), "a call wakes it with its data")
            need(asks.do("intact()"), "the data of the tenant that waited is intact")


def deadline(service: Service, place: Place) -> None:
    """Let a tenant request memory while the parking of 60 GiB for it lasts longer than the deadline of its policy."""
    with tempfile.TemporaryDirectory() as folder, parking(service, Path(folder), "park"):
        after = f"1h, deadline: {DEADLINE}s"
        first, second = _under_policy(service, place, ("first", "second"), after, LARGE).values()
        with _all_but(70 * GIB):
            holds, asks = Torch(first, 60), Torch(second, 1)
            time.sleep(STAYS)
            line, began = f"result('cuMemAlloc', C.c_size_t({12 * GIB}))", time.monotonic()
            need(asks.do(line) == 2, "a request is refused while a tenant is parked for it")
            took = time.monotonic() - began
            say("refused_after", f"{took:.2f}", "s")
            need(DEADLINE <= took < DEADLINE + 2, "it is refused at the deadline")
            becomes(first, "parked", 90)
            need(asks.do(line) == 0, "the same request has its memory when the tenant is parked")
            need(asks.do("intact()"), "the data of the tenant that waited is intact")
        need(holds.do("intact()", 120), "a call wakes the parked tenant with its data")


def idle(service: Service, place: Place) -> None:
    """Leave a program alone until it is parked, beside programs with a long kernel, with and without a thread in wait.

    A kernel of the driver's timer, `torch.cuda._sleep`, takes at least half of the seconds that are requested here.
    """
    with tempfile.TemporaryDirectory() as folder, parking(service, Path(folder)):
        tenants = _under_policy(service, place, ("notebook", "kernel", "waits", "rare"), f"{AFTER}s")
        programs = {name: Torch(tenant, HELD if name == "notebook" else 1) for name, tenant in tenants.items()}
        need(programs["kernel"].do("launched(160)"), "a kernel is launched")
        need(programs["waits"].do("waiting(160)"), "a kernel is launched, and a thread waits for it")
        notebook, before, began = tenants["notebook"], nvml.bytes_in_use(), time.monotonic()
        while state(notebook) != "parked" and time.monotonic() < began + 60:
            need(programs["rare"].do("trained()"), "a short kernel")
            time.sleep(3)
        say("parked_after", f"{time.monotonic() - began:.1f}", "s")
        print(fgpu("status").stdout, fgpu("explain", notebook.path).stdout)
        need(state(notebook) == "parked", "the notebook is parked")
        need(before - nvml.bytes_in_use() > HELD * GIB, "the device has its memory free")
        need(_parks(tenants) == {"notebook": 1, "kernel": 0, "waits": 0, "rare": 0}, "no other is parked")
        began = time.monotonic()
        need(programs["notebook"].do("intact()"), "a call wakes it with its data")
        say("woken_after", f"{time.monotonic() - began:.2f}", "s")
        eventually(lambda: _parks(tenants)["rare"] == 1, 60, "the program is parked that launches no longer")
        need(programs["rare"].do("intact()"), "it is woken with its data")
        need(_parks(tenants)["kernel"] == _parks(tenants)["waits"] == 0, "long kernels are not parked")
        print(fgpu("status").stdout)
