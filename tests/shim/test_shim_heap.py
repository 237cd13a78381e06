"""The heap of device code is requested before the first launch of code that calls malloc, if its limit was raised."""

from __future__ import annotations

from tests.shim.area_kit import MIB, area, asked, said
from tests.shim.cubin_kit import cubin
from tests.shim.shim_kit import Simulator

NO_RESOURCES = 701
CODE = """
MALLOC = HEAD + ".extern .func (.param .b64 r) malloc (.param .b64 s);\\n.visible .entry mal()\\n{\\n ret;\\n}\\n"
def heap(size): return L.cuCtxSetLimit(2, C.c_size_t(size))
f = function(load(MALLOC), "mal")
"""


def test_the_heap_is_requested_at_the_first_launch(simulator: Simulator) -> None:
    """The heap is requested once, with the limit at that moment, and only for code with malloc."""
    script = """
out(heap(100 * MiB), heap(32 * MiB + 1), launch(of(100)), launch(f), launch(f), heap(64 * MiB))
need("cuDevicePrimaryCtxReset_v2", 0); out(1)
"""
    assert said(simulator, CODE + script) == [[0, 0, 0, 0, 0, 1], [1]]
    assert asked(simulator.agent) == [36 * MIB, -36 * MIB]


def test_a_launch_whose_heap_does_not_fit_fails_with_the_driver_s_error(simulator: Simulator) -> None:
    """The memory that was admitted for the same launch is released."""
    script = """
g = function(load(MALLOC.replace("{", "{ .local .align 16 .b8 buf[4096];")), "mal")
out(heap(2 * GiB), launch(f), launch(g), launch(of(100)), heap(20 * MiB), launch(f))
"""
    assert said(simulator, CODE + script) == [[0, NO_RESOURCES, NO_RESOURCES, 0, 0, 0]]
    huge = (2 << 30) + 2 * MIB
    assert asked(simulator.agent) == [huge, area(4096), huge, -area(4096), 22 * MIB]


def test_the_heap_is_requested_for_kernels_of_libraries(simulator: Simulator) -> None:
    script = 'k = entry(library(MALLOC), "mal"); out(heap(32 * MiB), launch(k), launch(k))'
    assert said(simulator, CODE + script) == [[0, 0, 0]]
    assert asked(simulator.agent) == [34 * MIB]


def test_the_heap_is_requested_for_each_context(simulator: Simulator) -> None:
    script = """
inner = another(); g = function(load(MALLOC), "mal"); out(heap(32 * MiB), launch(g))
need("cuCtxSetCurrent", c); out(launch(f)); need("cuCtxDestroy_v2", inner); out(1)
"""
    assert said(simulator, CODE + script) == [[0, 0], [0], [1]]
    assert asked(simulator.agent) == [34 * MIB, -34 * MIB]


def test_a_failed_launch_releases_the_heap(simulator: Simulator) -> None:
    script = "out(heap(32 * MiB), L.cuLaunchKernel(f, 0, 1, 1, 1, 1, 1, 0, None, None, None), launch(f))"
    assert said(simulator, CODE + script) == [[0, 1, 0]]
    assert asked(simulator.agent) == [34 * MIB, -34 * MIB, 34 * MIB]


def test_a_heap_limit_as_in_a_new_context_is_not_requested(simulator: Simulator) -> None:
    assert said(simulator, CODE + "out(heap(32 * MiB), heap(8 * MiB), launch(f))") == [[0, 0, 0]]
    assert asked(simulator.agent) == []


def test_the_heap_is_requested_for_code_in_a_binary(simulator: Simulator) -> None:
    image = (cubin(("malloc", 8, 1)) + bytes(64)).hex()
    script = f"""
m = C.c_void_p(); need("cuModuleLoadData", C.byref(m), bytes.fromhex("{image}"))
out(heap(32 * MiB), launch(function(m, "any")))
"""
    assert said(simulator, CODE + script) == [[0, 0]]
    assert asked(simulator.agent) == [34 * MIB]
