"""Two devices, host and managed memory, array shapes, and the oldest forms of calls."""

from __future__ import annotations

from collections.abc import Callable

from .conftest import Machine

PAIR = """
need("cuInit", 0); contexts = [C.c_void_p(), C.c_void_p()]
for device in range(2):
    need("cuDevicePrimaryCtxRetain", C.byref(contexts[device]), device)
def on(device):
    need("cuCtxSetCurrent", contexts[device])
"""


def test_peer_access_works_between_devices(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(FGPU_SIM_GPUS="2")
    script = """
can = C.c_int()
say([(L.cuDeviceCanAccessPeer(C.byref(can), a, b), can.value) for a in range(2) for b in range(2)])
say(L.cuDeviceCanAccessPeer(C.byref(can), 0, 2), L.cuDeviceGetP2PAttribute(C.byref(can), 2, 0, 1), can.value)
say(L.cuCtxEnablePeerAccess(contexts[1], 0)); on(0); created = C.c_void_p()
say([L.cuCtxEnablePeerAccess(c, f) for c, f in ((contexts[1], 1), (contexts[0], 0), (None, 0), (contexts[1], 0))])
say(L.cuCtxEnablePeerAccess(contexts[1], 0), [L.cuCtxDisablePeerAccess(contexts[1]) for _ in range(2)])
need("cuCtxCreate_v2", C.byref(created), 0, 0); say(L.cuCtxEnablePeerAccess(contexts[0], 0))
need("cuCtxEnablePeerAccess", contexts[1], 0); need("cuDevicePrimaryCtxReset_v2", 1)
say(L.cuCtxDisablePeerAccess(contexts[1]))
need("cuDevicePrimaryCtxRetain", C.byref(contexts[1]), 1); say(L.cuCtxDisablePeerAccess(contexts[1]))
"""
    assert machine.python(PAIR + script) == [
        "[(0, 0), (0, 1), (0, 1), (0, 0)]",
        "101 0 1",
        "201",
        "[1, 201, 201, 0]",
        "704 [0, 705]",
        "217",
        "709",
        "705",
    ]


def test_copies_between_devices_keep_contents_and_memory_stays_separate(make_machine: Callable[..., Machine]) -> None:
    """Each device has its own memory, and copied contents arrive."""
    machine = make_machine(FGPU_SIM_GPUS="2")
    script = """
on(1); there = alloc(5 << 20); on(0); here = alloc(100); out = C.create_string_buffer(4)
need("cuMemcpyHtoD_v2", here, b"data", C.c_size_t(4))
need("cuMemcpyPeer", there, contexts[1], here, contexts[0], C.c_size_t(4))
need("cuMemsetD8_v2", here, 0, C.c_size_t(4))
need("cuMemcpyPeerAsync", here, contexts[0], there, contexts[1], C.c_size_t(4), None)
need("cuMemcpyDtoH_v2", out, here, C.c_size_t(4)); say(out.raw); say("up"); wait()
"""
    with machine.spawn(PAIR + script) as client:
        assert client.stdout is not None
        assert [client.stdout.readline() for _ in range(2)] == ["b'data'\n", "up\n"]
        assert [machine.process(client.pid, device)["block_bytes"] >> 20 for device in range(2)] == [2, 6]
        client.kill()


def test_memory_of_graphs_and_shares_belongs_to_its_device(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(FGPU_SIM_GPUS="2")
    script = """
on(1); s = stream(); graph, exec_, at = C.c_void_p(), C.c_void_p(), C.c_uint64(); handle = C.create_string_buffer(64)
need("cuStreamBeginCapture_v2", s, 0); need("cuMemAllocAsync", C.byref(at), C.c_size_t(1 << 20), s)
need("cuStreamEndCapture", s, C.byref(graph))
need("cuGraphInstantiateWithFlags", C.byref(exec_), graph, C.c_ulonglong(0)); need("cuGraphLaunch", exec_, s)
need("cuIpcGetMemHandle", handle, alloc(4 << 20)); say("up"); wait()
"""
    with machine.spawn(PAIR + script) as client:
        assert client.stdout is not None
        client.stdout.readline()
        first, second = (machine.process(client.pid, device) for device in range(2))
        assert (first["graph_bytes"], first["block_bytes"]) == (0, 0)
        assert (second["graph_bytes"] >> 20, second["block_bytes"] >> 20) == (32, 4)
        client.kill()
    machine.settles_at(0, within=1)
    assert machine.used(1) == 0


def test_host_memory_uses_no_device_memory(machine: Machine) -> None:
    script = """
start(); before = info()[0]; p, flags, d = C.c_void_p(), C.c_uint(), C.c_uint64()
need("cuMemAllocHost_v2", C.byref(p), C.c_size_t(64 << 20)); C.memset(p, 7, 4096); need("cuMemFreeHost", p)
need("cuMemHostAlloc", C.byref(p), C.c_size_t(64 << 20), 4); need("cuMemHostGetFlags", C.byref(flags), p)
page = C.create_string_buffer(8192); need("cuMemHostRegister_v2", page, C.c_size_t(8192), 0)
say(flags.value, L.cuMemHostRegister_v2(page, C.c_size_t(1), 0), *(L.cuMemHostUnregister(page) for _ in range(2)))
need("cuMemHostGetDevicePointer_v2", C.byref(d), p, 0); say(d.value == p.value, before - info()[0])
"""
    assert machine.python(script) == ["6 712 0 713", "True 0"]


def test_prefetches_and_advice_for_managed_memory_return_the_expected_results(machine: Machine) -> None:
    script = """
start(); before = info()[0]; m, plain = C.c_uint64(), alloc(1 << 20)
class Place(C.Structure):
    _fields_ = [("type", C.c_int), ("id", C.c_int)]
need("cuMemAllocManaged", C.byref(m), C.c_size_t(8 << 20), 1); size = C.c_size_t(8 << 20)
say([L.cuMemPrefetchAsync(m, size, device, None) for device in (0, -1, 7)])
say([L.cuMemPrefetchAsync_v2(m, size, Place(kind, 0), 0, None) for kind in (1, 2, 3, 0)])
say(L.cuMemPrefetchAsync(m, C.c_size_t((8 << 20) + 1), 0, None), L.cuMemPrefetchAsync(plain, C.c_size_t(1), 0, None))
say([L.cuMemAdvise(m, size, advice, 0) for advice in range(8)], L.cuMemAdvise(m, size, 3, 7))
say(L.cuMemAdvise_v2(m, size, 3, Place(1, 0)), (before - info()[0]) >> 20)
"""
    assert machine.python(script) == ["[0, 0, 101]", "[0, 0, 0, 1]", "1 1", "[1, 0, 0, 0, 0, 0, 0, 1] 101", "0 130"]


def test_arrays_and_their_levels_have_descriptors_until_they_are_destroyed(machine: Machine) -> None:
    script = """
class Shape(C.Structure):
    _fields_ = [("width", C.c_size_t), ("height", C.c_size_t), ("depth", C.c_size_t),
                ("format", C.c_int), ("channels", C.c_uint), ("flags", C.c_uint)]
class Flat(C.Structure):
    _fields_ = [("width", C.c_size_t), ("height", C.c_size_t), ("format", C.c_int), ("channels", C.c_uint)]
def told(array):
    s, f = Shape(), Flat()
    results = L.cuArray3DGetDescriptor_v2(C.byref(s), array), L.cuArrayGetDescriptor_v2(C.byref(f), array)
    return *results, s.width, s.height, s.depth, f.width, f.height, s.format == f.format, s.channels
start(); before = info()[0]; flat, deep, mip, level, again = (C.c_void_p() for _ in range(5))
need("cuArrayCreate_v2", C.byref(flat), C.byref(Flat(64, 32, 0x20, 2))); say(*told(flat))
need("cuArray3DCreate_v2", C.byref(deep), C.byref(Shape(8, 8, 8, 0x20, 1, 0))); say(*told(deep)[:5])
need("cuMipmappedArrayCreate", C.byref(mip), C.byref(Shape(64, 16, 0, 0x20, 1, 0)), 6); taken = before - info()[0]
need("cuMipmappedArrayGetLevel", C.byref(level), mip, 5); need("cuMipmappedArrayGetLevel", C.byref(again), mip, 5)
say(*told(level), level.value == again.value, L.cuMipmappedArrayGetLevel(C.byref(level), mip, 6))
say(before - info()[0] == taken)
say(L.cuArrayDestroy(again), L.cuMipmappedArrayDestroy(mip), told(again)[0], L.cuArrayGetDescriptor_v2(None, flat))
need("cuArrayDestroy", flat); need("cuArrayDestroy", deep); say(before - info()[0], told(flat)[:2])
"""
    assert machine.python(script) == [
        "0 0 64 32 0 64 32 True 2",
        "0 0 8 8 8",
        "0 0 2 1 0 2 1 True 1 True 1",
        "True",
        "400 0 400 1",
        "0 (400, 400)",
    ]


def test_the_oldest_functions_exist_and_allocate_nothing(machine: Machine) -> None:
    """Allocations and contexts fail. A device's memory is shown as the largest 32-bit value."""
    script = """
start(); before = info()[0]; p, free, total, version = C.c_uint(), C.c_uint(), C.c_uint(), C.c_uint()
say(L.cuMemAlloc(C.byref(p), 1000), L.cuMemFree(7), L.cuMemGetInfo(C.byref(free), C.byref(total)))
need("cuDeviceTotalMem", C.byref(total), 0); say(total.value == (1 << 32) - 1)
context = C.c_void_p(); say(L.cuCtxCreate(C.byref(context), 0, 0), L.cuCtxCreate(C.byref(context), 0, 99), context)
need("cuCtxGetApiVersion", None, C.byref(version)); say(version.value, before - info()[0])
"""
    assert machine.python(script) == ["201 201 201", "True", "2 101 c_void_p(None)", "3020 0"]
