"""The shim with the simulated driver: shares in nvidia-smi and in programs, process lists, arrays and pools."""

import re

from tests.shim.array_kit import ARRAYS
from tests.shim.shim_kit import Simulator
from tests.shim.view_kit import NVML

GIB, OOM = 1 << 30, 2


def test_nvidia_smi_shows_the_share(simulator: Simulator) -> None:
    simulator.agent.do("limit", limit=GIB, used=256 << 20)
    table = simulator.run(simulator.folder / "nvidia-smi")
    assert re.findall(r"(\d+)MiB / +(\d+)MiB", table)[0] == ("256", "1024")


def test_an_allocation_beyond_the_share_is_refused_and_the_share_is_shown(simulator: Simulator) -> None:
    script = """
c = C.c_void_p(); L.cuInit(0); L.cuDevicePrimaryCtxRetain(C.byref(c), 0); L.cuCtxSetCurrent(c)
out(alloc(256 * MiB), alloc(1 * GiB), info())
"""
    assert simulator.python(script) == f"[0, {OOM}, [0, {768 << 20}, {GIB}]]\n"


def test_process_lists_do_not_show_neighbours(simulator: Simulator) -> None:
    holder = "c = C.c_void_p(); L.cuInit(0); L.cuDevicePrimaryCtxRetain(C.byref(c), 0); out(1); sys.stdin.readline()"
    process = simulator.agent.start_python(holder, driver=simulator.folder / "lib")
    process.stdout.readline()
    show = NVML + 'out([p[0] for p in processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, 8)[2]])'
    simulator.agent.do("set", answer="unmanaged")
    assert simulator.python(show) == f"[[{process.pid}]]\n"
    simulator.agent.do("set", answer="managed", rows=[[9, 3, 1 << 20]])
    assert simulator.python(show) == "[[9]]\n"
    process.communicate("\n", timeout=10)


CONTEXT = "c = C.c_void_p(); L.cuInit(0); L.cuDevicePrimaryCtxRetain(C.byref(c), 0); L.cuCtxSetCurrent(c)\n"


def test_arrays_of_every_kind_are_refused_at_the_limit(simulator: Simulator) -> None:
    script = (
        CONTEXT
        + ARRAYS
        + """
kinds = lambda: two(1024, 1024, 32, 1), lambda: three(64, 64, 64, 32, 4, 0), lambda: mip(3, 1024, 1024, 0, 32, 1, 0)
for make in kinds:
    n = 0
    while make() == 0: n += 1
    out(n, make())"""
    )
    assert simulator.python(script) == f"[256, {OOM}]\n[0, {OOM}]\n[0, {OOM}]\n"


def test_stream_ordered_allocations_use_the_share_and_no_more(simulator: Simulator) -> None:
    """The simulated pool grows by 32 MiB and shrinks when a thread waits, as a real one does."""
    script = (
        CONTEXT
        + """
def new(n):
    p = C.c_uint64(); r = L.cuMemAllocAsync(C.byref(p), C.c_size_t(n), None); return r or p.value
pool, v = C.c_void_p(), C.c_uint64()
L.cuDeviceGetDefaultMemPool(C.byref(pool), 0)
def reserved(): L.cuMemPoolGetAttribute(pool, 5, C.byref(v)); return v.value >> 20
ps = []
while (p := new(2 * MiB)) > 1000: ps.append(p)
out(len(ps), p, reserved(), alloc(MiB))
for p in ps: L.cuMemFreeAsync(C.c_uint64(p), None)
out(reserved(), info()[1] >> 20); L.cuCtxSynchronize(); out(reserved(), info()[1] >> 20, alloc(900 * MiB))"""
    )
    assert simulator.python(script) == f"[512, {OOM}, 1024, {OOM}]\n[1024, 0]\n[0, 1024, 0]\n"
