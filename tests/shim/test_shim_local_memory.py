"""Local memory of threads is requested before the driver allocates it, and released when the driver frees it."""

from __future__ import annotations

import pytest

from tests.shim.area_kit import MIB, area, asked, said
from tests.shim.shim_kit import Agent, Simulator

OOM, GIB = 2, 1 << 30
INVALID, UNSAFE = 1, 900


def test_memory_for_a_raised_stack_limit_is_requested_and_released(simulator: Simulator) -> None:
    sizes = [8192, 8192, 3000, 1024, 512, 8192, 0]
    assert said(simulator, f"out(*[stack(n) for n in {sizes}])") == [[0] * len(sizes)]
    large, small = area(8192), area(3000)
    assert asked(simulator.agent) == [large, small - large, -small, large, -large]
    assert simulator.agent.do("look")["used"] == 0


def test_a_stack_limit_that_does_not_fit_is_refused_and_unchanged(simulator: Simulator) -> None:
    script = """
v = C.c_size_t()
def limit(): need("cuCtxGetLimit", C.byref(v), 0); return v.value
out(stack(8192), limit(), stack(64 << 10), limit(), stack(4096), limit())
"""
    assert said(simulator, script) == [[0, 8192, OOM, 8192, 0, 4096]]
    assert asked(simulator.agent) == [area(8192), area(64 << 10) - area(8192), area(4096) - area(8192)]


def test_an_admission_whose_call_the_driver_refuses_is_released(simulator: Simulator) -> None:
    script = """
s = stream(); out(stack((512 << 10) + 1), L.cuCtxSetLimit(1, C.c_size_t(1 << 20)))
need("cuStreamBeginCapture_v2", s, 0); out(stack(2048))
need("cuCtxPopCurrent_v2", C.byref(c)); out(stack(4096))
"""
    assert said(simulator, script) == [[INVALID, 0], [UNSAFE], [201]]
    assert asked(simulator.agent) == [area(2048), -area(2048)]


WAYS = {
    "cuLaunchKernel": "launch(f)",
    "cuLaunchKernel_ptsz": "L.cuLaunchKernel_ptsz(f, 1, 1, 1, 1, 1, 1, 0, None, None, None)",
    "cuLaunchKernelEx": "L.cuLaunchKernelEx(C.byref(config), f, None, None)",
    "cuLaunchKernelEx_ptsz": "L.cuLaunchKernelEx_ptsz(C.byref(config), f, None, None)",
    "cuLaunchCooperativeKernel": "L.cuLaunchCooperativeKernel(f, 1, 1, 1, 1, 1, 1, 0, None, None)",
    "cuLaunchCooperativeKernel_ptsz": "L.cuLaunchCooperativeKernel_ptsz(f, 1, 1, 1, 1, 1, 1, 0, None, None)",
    "cuLaunch": "L.cuFuncSetBlockShape(f, 1, 1, 1) or L.cuLaunch(f)",
    "cuLaunchGrid": "L.cuFuncSetBlockShape(f, 1, 1, 1) or L.cuLaunchGrid(f, 1, 1)",
    "cuLaunchGridAsync": "L.cuFuncSetBlockShape(f, 1, 1, 1) or L.cuLaunchGridAsync(f, 1, 1, None)",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [8192, 64 << 10], ids=["fits", "refused"])
def test_local_memory_is_requested_at_the_first_launch(simulator: Simulator, way: str, size: int) -> None:
    script = f"""
config = Config((C.c_uint * 7)(1, 1, 1, 1, 1, 1, 0)); f = of({size})
out(*[{WAYS[way]} for _ in range(3)])
"""
    fits = size == 8192
    assert said(simulator, script) == [[0 if fits else OOM] * 3]
    assert asked(simulator.agent) == [area(size)] * (1 if fits else 3)


def test_a_launch_that_fits_into_the_present_local_memory_requests_nothing(simulator: Simulator) -> None:
    script = (
        "a, b, d = of(1024), of(5000), of(4000); out(*[launch(f) for f in (a, b, d, b, a)], stack(5008), launch(b))"
    )
    assert said(simulator, script) == [[0] * 7]
    assert asked(simulator.agent) == [area(5000)]


def test_recorded_sizes_of_functions_are_dropped_when_their_cause_ends(simulator: Simulator) -> None:
    """The causes are a smaller limit, a reset context, and a new function at the address of another one."""
    script = """
f = of(4096); out(launch(f), launch(f), stack(1024), launch(f), launch(f))
need("cuDevicePrimaryCtxReset_v2", 0); context(); f = of(4096); out(launch(f))
inner = another(); g = of(2048); out(launch(g)); need("cuCtxDestroy_v2", inner); need("cuCtxSetCurrent", c)
seen = set()
for n in range(40):
    m = load(local(4096 + 16 * n)); f = function(m); seen.add(f.value)
    need("cuLaunchKernel", f, *[1] * 6, 0, *[None] * 3)
    need("cuModuleUnload", m)
out(len(seen) < 40)
"""
    assert said(simulator, script) == [[0, 0, 0, 0, 0], [0], [0], [True]]
    first, inner = area(4096), area(2048)
    steps = [area(4096 + 16 * n) - area(4096 + 16 * (n - 1)) for n in range(1, 40)]
    expected = [first, -first, first, -first, first, inner, -inner, *(step for step in steps if step)]
    assert asked(simulator.agent) == expected


def test_local_memory_is_requested_for_each_context(simulator: Simulator) -> None:
    """Kernels of a library have one handle for all contexts."""
    script = """
k = entry(library(local(4096))); out(*[launch(k) for _ in range(3)])
inner = another(); innermost = another(); out(*[launch(k) for _ in range(3)])
need("cuCtxSetCurrent", inner); out(launch(k)); need("cuCtxSetCurrent", c); out(launch(k))
need("cuCtxDestroy_v2", inner); out(launch(k))
"""
    assert said(simulator, script) == [[0, 0, 0], [0, 0, 0], [0], [0], [0]]
    assert asked(simulator.agent) == [area(4096)] * 3 + [-area(4096)]


def test_local_memory_is_requested_for_captured_launches(simulator: Simulator) -> None:
    """The shim's own calls do not break a capture in the strictest mode."""
    script = """
f, s, g = of(4096), stream(), C.c_void_p(); need("cuStreamBeginCapture_v2", s, 0)
out(launch(f, s), launch(f, s)); need("cuStreamEndCapture", s, C.byref(g))
"""
    assert said(simulator, script) == [[0, 0]]
    assert asked(simulator.agent) == [area(4096)]


NODES = """
class Params(C.Structure):
    _fields_ = [("f", C.c_void_p), ("n", C.c_uint * 7), ("a", C.c_void_p * 2), ("kernel", C.c_void_p * 2)]
class Any(C.Structure):
    _fields_ = [("type", C.c_int), ("r", C.c_int * 3), ("p", Params), ("rest", C.c_uint8 * 160)]
def params(f, kernel=None): return Params(f, (C.c_uint * 7)(*[1] * 6, 0), (C.c_void_p * 2)(), (C.c_void_p * 2)(kernel))
def any(f, kernel=None, type=0): return Any(type, (C.c_int * 3)(), params(f, kernel))
n, g = C.c_void_p(), C.c_void_p(0x60)
def add(name, p, *edges): return getattr(L, name)(C.byref(n), g, None, *edges, C.c_size_t(0), C.byref(p))
"""
MADE = {
    "cuGraphAddKernelNode": "params(f)",
    "cuGraphAddKernelNode_v2": "params(f)",
    "cuGraphAddNode": "any(f)",
    "cuGraphAddNode_v2": "any(f), None",
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("size", [8192, 64 << 10], ids=["fits", "refused"])
def test_local_memory_is_requested_for_the_first_node_of_a_graph(simulator: Simulator, name: str, size: int) -> None:
    script = f"""
need("cuGraphCreate", C.byref(g), 0); f = of({size}); out(*[add("{name}", {MADE[name]}) for _ in range(2)])
"""
    assert said(simulator, NODES + script) == [[0 if size == 8192 else OOM] * 2]
    assert asked(simulator.agent) == [area(size)] * (1 if size == 8192 else 2)


@pytest.mark.parametrize("made", ["params(None, k)", "any(None, k)"])
def test_local_memory_is_requested_for_nodes_of_library_kernels(simulator: Simulator, made: str) -> None:
    name = "cuGraphAddKernelNode_v2" if made.startswith("params") else "cuGraphAddNode"
    script = f'need("cuGraphCreate", C.byref(g), 0); k = entry(library(local(8192))); out(add("{name}", {made}))'
    assert said(simulator, NODES + script) == [[0]]
    assert asked(simulator.agent) == [area(8192)]


CHANGED = {
    "cuGraphKernelNodeSetParams": "g, C.byref(params(f))",
    "cuGraphKernelNodeSetParams_v2": "g, C.byref(params(f))",
    "cuGraphNodeSetParams": "g, C.byref(any(f))",
    "cuGraphExecKernelNodeSetParams": "g, g, C.byref(params(f))",
    "cuGraphExecKernelNodeSetParams_v2": "g, g, C.byref(params(f))",
    "cuGraphExecNodeSetParams": "g, g, C.byref(any(f))",
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("fits", [True, False])
def test_local_memory_is_requested_for_changed_nodes(held: Agent, name: str, fits: bool) -> None:
    """The stand-in for the driver has functions that all need 2 KiB."""
    script = "c, f = C.c_void_p(), C.c_void_p(0x5000); L.cuDevicePrimaryCtxRetain(C.byref(c), 0)\n" + NODES
    held.do("limit", limit=GIB if fits else 1)
    assert held.python(script + f"C.set_errno(7); out(L.{name}({CHANGED[name]}), C.get_errno())") == [
        [0 if fits else OOM, 7]
    ]
    assert asked(held) == [2 * MIB]


@pytest.mark.parametrize("params", ["None", "C.byref(any(f, type=1))"])
def test_changed_nodes_without_a_kernel_request_no_local_memory(held: Agent, params: str) -> None:
    script = "c, f = C.c_void_p(), C.c_void_p(0x5000); L.cuDevicePrimaryCtxRetain(C.byref(c), 0)\n" + NODES
    assert held.python(script + f"out(L.cuGraphNodeSetParams(g, {params}))") == [[0]]
    assert asked(held) == []


def test_a_failed_launch_releases_its_admission(simulator: Simulator) -> None:
    script = "f = of(4096); out(L.cuLaunchKernel(f, 0, 1, 1, 1, 1, 1, 0, None, None, None), launch(None), launch(f))"
    assert said(simulator, script) == [[1, 400, 0]]
    assert asked(simulator.agent) == [area(4096), -area(4096), area(4096)]


@pytest.mark.parametrize("how", ["observed", "unmanaged", "absent"])
def test_no_local_memory_is_requested_without_an_enforced_limit(simulator: Simulator, how: str) -> None:
    agent = simulator.agent
    if how == "observed":
        agent.do("limit", limit=GIB, flags=1)
    elif how == "unmanaged":
        agent.do("set", answer="unmanaged")
    else:
        agent.do("remove")
    script = "f = of(64 << 10); out(launch(f), launch(f), stack(8192))"
    assert said(simulator, script) == [[0, 0, 0]]
    assert asked(agent) == []


def test_the_end_of_a_context_releases_its_local_memory(simulator: Simulator) -> None:
    script = """
out(stack(4096)); inner = another(); out(stack(8192), launch(of(9000)))
need("cuCtxDestroy_v2", inner); need("cuDevicePrimaryCtxRelease_v2", 0); out(1)
"""
    assert said(simulator, script) == [[0], [0, 0], [1]]
    assert simulator.agent.do("look")["used"] == 0
    assert sum(size for size in asked(simulator.agent) if size > 0) == area(4096) + area(9000)


def test_threads_that_first_launch_one_function_together_request_once(simulator: Simulator) -> None:
    """A second request would be refused, because only one fits."""
    script = """
f = of(16 << 10); gate = threading.Barrier(8); results = []
def run(): need("cuCtxSetCurrent", c); gate.wait(); results.append(launch(f))
threads = [threading.Thread(target=run) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
out(*results)
"""
    assert said(simulator, script) == [[0] * 8]
    assert asked(simulator.agent) == [area(16 << 10)]


def test_pools_are_trimmed_for_a_launch(simulator: Simulator) -> None:
    script = """
p, f = C.c_uint64(), of(16 << 10); need("cuMemAllocAsync", C.byref(p), C.c_size_t(600 * MiB), None)
pool, keep = C.c_void_p(), C.c_uint64(1 << 40); need("cuDeviceGetDefaultMemPool", C.byref(pool), 0)
need("cuMemPoolSetAttribute", pool, 4, C.byref(keep))
out(launch(f)); need("cuMemFreeAsync", p, None); need("cuCtxSynchronize"); out(launch(f))
"""
    assert said(simulator, script) == [[OOM], [0]]


def test_the_shim_does_not_change_errno(held: Agent) -> None:
    """The stand-in for the driver changes errno whenever the shim calls it."""
    script = """
c, f = C.c_void_p(), C.c_void_p(0x5000); L.cuDevicePrimaryCtxRetain(C.byref(c), 0); C.set_errno(77)
out(L.cuLaunchKernel(f, 1, 1, 1, 1, 1, 1, 0, None, None, None), C.get_errno())
C.set_errno(78); out(L.cuCtxSetLimit(0, C.c_size_t(4096)), C.get_errno())
"""
    assert held.python(script) == [[0, 77], [0, 78]]
    assert asked(held) == [2 * MIB, 4 * MIB]
