"""The shim requests nothing for a call that the driver refuses without a context, and takes no room from others."""

import pytest

from tests.shim.shim_kit import Agent, Simulator

MEMORY, POOL = 0, 1
NONE, GONE = 201, 709
CALLS = """
p, pitch, a, c = C.c_uint64(), C.c_size_t(), C.c_void_p(), C.c_void_p()
flat = (C.c_uint64 * 4)(1024, 1024, 1 << 32 | 0x20)
def each():
    n = C.c_size_t(400 * MiB)
    return [L.cuMemAlloc_v2(C.byref(p), n), L.cuMemAllocPitch_v2(C.byref(p), C.byref(pitch), n, C.c_size_t(1), 4),
            L.cuMemAllocManaged(C.byref(p), n, 1), L.cuArrayCreate_v2(C.byref(a), flat),
            L.cuMemAllocAsync(C.byref(p), n, None), L.cuMemAllocAsync_ptsz(C.byref(p), n, None)]
L.cuInit(0)
"""
# Ways in which a thread has no context or an ended one. A pool has been used before.
WAYS = {
    "none": ("pass", NONE),
    "released": ("L.cuDevicePrimaryCtxRelease_v2(0)", GONE),
    "reset": ("L.cuDevicePrimaryCtxReset_v2(0)", GONE),
    "destroyed": ("L.cuCtxCreate_v2(C.byref(c), 0, 0); L.cuCtxDestroy_v2(c); L.cuCtxSetCurrent(c)", GONE),
    "taken away": ("L.cuCtxSetCurrent(None)", NONE),
}
RETAINED = "L.cuDevicePrimaryCtxRetain(C.byref(c), 0); L.cuCtxSetCurrent(c)\n"


def asked(simulator: Simulator) -> int:
    return len([c for c in simulator.agent.calls() if c["kind"] in (MEMORY, POOL)])


@pytest.mark.parametrize("way", WAYS)
def test_no_allocation_without_a_live_context_is_requested(simulator: Simulator, way: str) -> None:
    how, error = WAYS[way]
    begin = "" if way == "none" else RETAINED
    said = simulator.python(CALLS + begin + how + "\nout(each())")
    assert said == f"[[{', '.join([str(error)] * 6)}]]\n"
    assert asked(simulator) == 0


@pytest.mark.parametrize("end", ["Release_v2", "Reset_v2"])
def test_an_allocation_in_a_recreated_primary_context_is_requested(simulator: Simulator, end: str) -> None:
    script = CALLS + RETAINED + f"L.cuDevicePrimaryCtx{end}(0)\n" + RETAINED + "n = C.c_size_t(MiB)\n"
    assert simulator.python(script + "out(L.cuMemAlloc_v2(C.byref(p), n))") == "[0]\n"
    assert asked(simulator) == 1


def test_an_allocation_in_another_context_is_requested_after_one_context_has_ended(simulator: Simulator) -> None:
    script = CALLS + RETAINED + "d = C.c_void_p(); L.cuCtxCreate_v2(C.byref(d), 0, 0); L.cuCtxDestroy_v2(d)\n"
    script += "L.cuCtxSetCurrent(c); out(L.cuMemAlloc_v2(C.byref(p), C.c_size_t(MiB)))\n"
    script += "L.cuCtxCreate_v2(C.byref(d), 0, 0); out(L.cuMemAlloc_v2(C.byref(p), C.c_size_t(MiB)))"
    assert simulator.python(script) == "[0]\n[0]\n"
    assert asked(simulator) == 2


def test_no_thread_without_a_context_allocates_from_admitted_pool_room(simulator: Simulator) -> None:
    script = CALLS + RETAINED + "n = C.c_size_t(MiB); out(L.cuMemAllocAsync(C.byref(p), n, None))\n"
    script += "L.cuCtxSetCurrent(None); out([L.cuMemAllocAsync(C.byref(p), C.c_size_t(20 * MiB), None) for _ in '12'])"
    assert simulator.python(script) == f"[0]\n[[{NONE}, {NONE}]]\n"
    assert asked(simulator) == 1


def test_a_new_context_with_the_handle_of_an_ended_one_may_allocate(held: Agent) -> None:
    """The new context was created where the shim has no hook. The driver's state decides whether it exists."""
    script = "c = C.c_void_p(); L.cuDevicePrimaryCtxRetain(C.byref(c), 0); L.fake_active(0)\n"
    script += "L.cuDevicePrimaryCtxRelease_v2(0); C.set_errno(77); out(alloc(MiB), C.get_errno())"
    assert held.python(script) == [[0, 77]]
    assert len(held.calls(MEMORY)) == 1
