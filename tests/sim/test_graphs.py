"""Stream capture and graphs: which calls can be captured, which break a capture, and what memory graphs hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.wait import eventually

from .conftest import MIB, Machine, say
from .device_time_kit import queue

BINDINGS = """
from cuda.bindings import driver as D
def ok(answer):
    assert answer[0] == D.CUresult.CUDA_SUCCESS, answer
    return answer[1] if len(answer) == 2 else answer[1:]
def taken():
    return (before - ok(D.cuMemGetInfo())[0]) >> 20
def want(size):
    params = D.CUDA_MEM_ALLOC_NODE_PARAMS()
    params.poolProps.allocType = D.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    params.poolProps.location.type = D.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    params.bytesize = size
    return params
ok(D.cuInit(0))
context = ok(D.cuCtxCreate(None, 0, ok(D.cuDeviceGet(0))))
before = ok(D.cuMemGetInfo())[0]
GLOBAL, LOCAL, RELAXED = list(D.CUstreamCaptureMode)
"""

FINE = "0 0 1 0 1"
REFUSED = "0 900 2 901 0 0"
IMPLICIT = "0 906 2 901 0 0"

# Action -> its effect in a global capture, a thread-local one, a relaxed one, and a global one while its own thread is
# relaxed: began, result, status then, result of the end, graph or none, nodes.
ACTS = {
    "nothing": [f"{FINE} 0"] * 4,
    **{
        name: [REFUSED, REFUSED, f"{FINE} 0", f"{FINE} 0"]
        for name in ("alloc", "alloc.pitch", "alloc.managed", "alloc.host", "array", "event.query", "query.other")
    },
    **{
        name: [REFUSED, REFUSED, f"{FINE} 0", f"{FINE} 0"]
        for name in ("alloc.async.other", "free.null", "trim", "instantiate")
    },
    **{name: [REFUSED] * 4 for name in ("query", "wait", "wait.context", "graph", "upload")},
    **{name: [f"{FINE} 1"] * 4 for name in ("launch", "copy.async", "set.async", "alloc.async")},
    **{name: [f"{FINE} 0"] * 4 for name in ("copy", "set", "info", "create")},
    **{name: [f"{FINE} 0"] * 4 for name in ("launch.other", "graph.other", "stream.create")},
    "alloc.free.async": [f"{FINE} 2"] * 4,
    "free.async.pooled": ["0 1 1 0 1 0"] * 4,
    "depend": ["0 905 2 901 0 0"] * 4,
    "depend.external": [f"{FINE} 1"] * 4,
    "depend.unrecorded": [f"{FINE} 0"] * 4,
    "record.query": ["0 907 2 901 0 0"] * 4,
    "module": ["0 0 2 901 0 0"] * 2 + [f"{FINE} 0"] * 2,
    "again": ["0 401 1 0 1 0"] * 4,
}

# In a blocking stream the legacy stream is unusable too.
BLOCKING = dict.fromkeys(("launch.legacy", "copy", "set", "query.legacy", "wait.legacy"), IMPLICIT)
BLOCKING["capturing.legacy"] = "0 906 1 0 1 0"

ENDS = {
    "begin.legacy": 900,
    "begin.mode": 1,
    "end.none": 401,
    "fork.status": 1,
    "fork.end.other": 903,
    "fork.end": 901,
    "fork.after.status": 0,
    "unjoined.end": 904,
    "join.end": 0,
    "join.nodes": 3,
    "end.null": 401,
    "late.query": 1,
    "late.wait": 1,
    "late.depend": 1,
    "late.end": 901,
    "merge": 902,
    "merge.end": 901,
    "merge.end.other": 901,
    "destroy": 0,
    "info.n": 0,
    "info.launched.n": 1,
    "info.graph.same": 1,
}


def answers(machine: Machine, program: Path, section: str) -> dict[str, str]:
    lines = machine.run(program, section).stdout.splitlines()
    return dict(line.removeprefix(f"{section}.").split(" ", 1) for line in lines if line.startswith(section))


def test_calls_during_a_capture_have_the_expected_effects(machine: Machine, program: Path) -> None:
    said = answers(machine, program, "capture")
    for name, expected in ACTS.items():
        assert [said[f"{how}.{name}"] for how in ("global", "local", "relaxed", "exchanged")] == expected, name
    assert {name: said[f"blocking.{name}"] for name in BLOCKING} == BLOCKING
    assert {name: int(said[name]) for name in ENDS} == ENDS


@pytest.mark.parametrize(
    ("mode", "other", "query", "end"), [(0, 0, 900, 901), (0, 1, 0, 0), (0, 2, 0, 0), (1, 0, 0, 0), (2, 0, 0, 0)]
)
def test_only_a_global_capture_is_broken_by_another_thread(
    machine: Machine, mode: int, other: int, query: int, end: int
) -> None:
    """Another thread breaks it only while that thread's own capture mode is global."""
    script = f"""
import threading
context = start(); s = stream(); event, graph = C.c_void_p(), C.c_void_p()
need("cuEventCreate", C.byref(event), 0); need("cuEventRecord", event, None)
need("cuStreamBeginCapture_v2", s, {mode})
said = []
def work():
    need("cuCtxSetCurrent", context)
    need("cuThreadExchangeStreamCaptureMode", C.byref(C.c_int({other})))
    said.append(L.cuEventQuery(event))
    said.append(L.cuStreamEndCapture(s, C.byref(graph)) if {mode} != 2 else 908)
thread = threading.Thread(target=work); thread.start(); thread.join()
say(*said, L.cuStreamEndCapture(s, C.byref(graph)), bool(graph))
"""
    assert machine.python(script) == [f"{query} 908 {end} {end == 0}"]


def test_a_capture_ends_when_its_first_stream_is_destroyed_and_breaks_with_another(machine: Machine) -> None:
    """The loss of the capture's first stream ends the capture. The loss of another stream breaks it."""
    script = """
start(); s, t, u = stream(), stream(), stream(); fork, graph = C.c_void_p(), C.c_void_p(1)
need("cuEventCreate", C.byref(fork), 2); _, nothing = kernel("spin_0us")
need("cuStreamBeginCapture_v2", s, 0); launch(nothing, s)
need("cuEventRecord", fork, s); need("cuStreamWaitEvent", t, fork, 0)
say(L.cuStreamDestroy_v2(s), L.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(1)), L.cuStreamQuery(t))
say(L.cuEventSynchronize(fork), L.cuStreamWaitEvent(t, fork, 0), L.cuEventRecord(fork, t), L.cuEventQuery(fork))
need("cuStreamBeginCapture_v2", u, 0)
need("cuEventRecord", fork, u); need("cuStreamWaitEvent", t, fork, 0); launch(nothing, t)
say(L.cuStreamDestroy_v2(t), L.cuStreamEndCapture(u, C.byref(graph)), graph.value, L.cuStreamQuery(u))
"""
    assert machine.python(script) == ["0 0 0", "1 1 0 0", "0 901 None 0"]


def test_synchronising_another_context_does_not_break_a_capture(machine: Machine) -> None:
    script = """
start(); s = stream(); other, graph = C.c_void_p(), C.c_void_p()
need("cuStreamBeginCapture_v2", s, 2)
need("cuCtxCreate_v2", C.byref(other), 0, 0)
say(L.cuCtxSynchronize()); need("cuCtxPopCurrent_v2", None)
need("cuStreamEndCapture", s, C.byref(graph)); say(bool(graph))
"""
    assert machine.python(script) == ["0", "True"]


def test_a_context_that_ends_ends_its_captures(machine: Machine) -> None:
    script = """
start(); s = stream()
need("cuStreamBeginCapture_v2", s, 0)
need("cuMemAllocAsync", C.byref(C.c_uint64()), C.c_size_t(1 << 20), s)
need("cuDevicePrimaryCtxReset_v2", 0); start()
say(L.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(1)))
"""
    assert machine.python(script) == ["0"]


def test_graph_memory_is_allocated_at_an_upload_or_launch_and_kept_until_a_trim(
    machine: Machine, program: Path
) -> None:
    """Launches in one stream share the memory."""
    said = answers(machine, program, "graph")
    footprint = {name: n for name, n in said.items() if name.startswith("footprint.") and "taken" in name}
    taken = {name.split(".")[1]: int(n) for name, n in footprint.items()}
    steps = {f"launched.{i}": int(said[f"footprint.launched.{i}.taken.mib"]) for i in range(3)}
    assert steps == {"launched.0": 32, "launched.1": 64, "launched.2": 64}
    del taken["launched"]
    assert taken == {
        "before": 0, "nodes": 0, "instantiated": 0, "uploaded": 32, "destroyed": 64, "trimmed": 0, "after": 0,
    }  # fmt: skip
    unfreed = {name: int(said[f"unfreed.{name}.taken.mib"]) for name in ("launched", "destroyed", "freed", "trimmed")}
    assert unfreed == {"launched": 64, "destroyed": 64, "freed": 64, "trimmed": 0}
    results = {
        "copy.value": 14, "cycle.instantiate": 1, "memory.clone": 801, "memory.free.twice": 1,
        "memory.free.owner.after": 1, "memory.instantiate.again": 801, "memory.instantiate.after": 0,
        "memory.free.unlaunched": 1, "unfreed.launch.again": 1, "unfreed.free": 0, "unfreed.free.twice": 1,
        "unfreed.value": 5, "auto.launch.again": 0, "memory.huge": 2, "huge.dptr": 0, "memory.range": 500, "nodes.n": 2,
        "roots.n": 1, "clone.n": 2,
    }  # fmt: skip
    assert {name: int(said[name]) for name in results} == results


def test_graph_memory_shows_in_nvml_and_dump(machine: Machine) -> None:
    pytest.importorskip("pynvml")
    script = """
import pynvml as N
N.nvmlInit(); device = N.nvmlDeviceGetHandleByIndex(0)
def held():
    return N.nvmlDeviceGetComputeRunningProcesses(device)[0].usedGpuMemory >> 20
start(); s = stream(); graph, exec_, at = C.c_void_p(), C.c_void_p(), C.c_uint64()
before = held()
need("cuStreamBeginCapture_v2", s, 0)
need("cuMemAllocAsync", C.byref(at), C.c_size_t(100 << 20), s)
need("cuStreamEndCapture", s, C.byref(graph))
need("cuGraphInstantiateWithFlags", C.byref(exec_), graph, C.c_ulonglong(0))
say(held() - before)
need("cuGraphLaunch", exec_, s); need("cuStreamSynchronize", s)
say(held() - before); wait()
need("cuMemFreeAsync", at, s); need("cuDeviceGraphMemTrim", 0)
say(held() - before)
"""
    with machine.spawn(script) as client:
        assert client.stdout is not None
        assert [client.stdout.readline() for _ in range(2)] == ["0\n", "128\n"]
        assert machine.process(client.pid)["graph_bytes"] == 128 * MIB
        say(client)
        assert client.stdout.readline() == "0\n"


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "need('cuDevicePrimaryCtxReset_v2', 0); say('x'); wait()"])
def test_the_end_of_a_process_or_context_frees_its_graph_memory(machine: Machine, end: str) -> None:
    script = f"""
start(); s = stream(); graph, exec_, at = C.c_void_p(), C.c_void_p(), C.c_uint64()
need("cuStreamBeginCapture_v2", s, 0)
need("cuMemAllocAsync", C.byref(at), C.c_size_t(100 << 20), s)
need("cuStreamEndCapture", s, C.byref(graph))
need("cuGraphInstantiateWithFlags", C.byref(exec_), graph, C.c_ulonglong(0))
need("cuGraphLaunch", exec_, s); say("up"); wait(); {end}
"""
    with machine.spawn(script) as client:
        assert client.stdout is not None
        client.stdout.readline()
        assert machine.process(client.pid)["graph_bytes"] == 128 * MIB
        say(client)
        eventually(lambda: not any(p["bytes"] for p in machine.dump()["processes"]), 1)
        client.kill()


def test_a_graph_launch_on_a_full_device_is_refused_and_succeeds_once_there_is_room(
    make_machine: Callable[..., Machine],
) -> None:
    machine = make_machine(FGPU_SIM_MEMORY="4GiB")
    script = """
start(); s = stream(); graph, exec_, at = C.c_void_p(), C.c_void_p(), C.c_uint64()
need("cuStreamBeginCapture_v2", s, 0)
need("cuMemAllocAsync", C.byref(at), C.c_size_t(2 << 30), s)
need("cuMemFreeAsync", at, s)
need("cuStreamEndCapture", s, C.byref(graph))
need("cuGraphInstantiateWithFlags", C.byref(exec_), graph, C.c_ulonglong(0))
big = alloc(2 << 30); before = info()
say(L.cuGraphLaunch(exec_, s), info() == before)
need("cuMemFree_v2", big)
say(L.cuGraphLaunch(exec_, s), L.cuGraphLaunch(exec_, s))
"""
    assert machine.python(script) == ["2 True", "0 0"]
    machine.settles_at(0)
    left = script.replace('need("cuMemFreeAsync", at, s)\n', "").replace("== before)", "== before, L.cuMemFree_v2(at))")
    assert machine.python(left) == ["2 True 1", "0 1"]


def test_a_graph_takes_as_long_as_its_longest_chain(machine: Machine) -> None:
    """The graph has two parallel branches of 50 ms, then a further node. Its launch does not wait for them."""
    script = """
s, t = stream(), stream(); _, spin = kernel("spin_50000us")
fork, join, graph, exec_ = C.c_void_p(), C.c_void_p(), C.c_void_p(), C.c_void_p()
need("cuEventCreate", C.byref(fork), 0); need("cuEventCreate", C.byref(join), 0)
need("cuStreamBeginCapture_v2", s, 0)
need("cuEventRecord", fork, s); need("cuStreamWaitEvent", t, fork, 0)
launch(spin, s); launch(spin, t)
need("cuEventRecord", join, t); need("cuStreamWaitEvent", s, join, 0); launch(spin, s)
need("cuStreamEndCapture", s, C.byref(graph))
need("cuGraphInstantiateWithFlags", C.byref(exec_), graph, C.c_ulonglong(0))
first = led(s); need("cuGraphLaunch", exec_, s); last = recorded(s); queued(first)
say(L.cuStreamQuery(s), ms(first, last)); began = time.monotonic(); need("cuGraphLaunch", exec_, s)
need("cuStreamSynchronize", s); say(time.monotonic() - began >= 0.1)
"""
    assert queue(machine, script) == ["600 100.0", "True"]


def test_a_graph_launch_in_a_parallel_stream_allocates_its_own_memory(machine: Machine) -> None:
    """The first launch still runs. A launch in the same stream would not allocate more memory."""
    script = """
start(); _, spin = kernel("spin_200000us"); base = [0]
def make(s, size=64):
    graph, exec_, at = C.c_void_p(), C.c_void_p(), C.c_uint64()
    need("cuStreamBeginCapture_v2", s, 0)
    need("cuMemAllocAsync", C.byref(at), C.c_size_t(size << 20), s); launch(spin, s)
    need("cuMemFreeAsync", at, s)
    need("cuStreamEndCapture", s, C.byref(graph))
    need("cuGraphInstantiateWithFlags", C.byref(exec_), graph, C.c_ulonglong(0))
    return exec_
def go(exec_, s):
    need("cuGraphLaunch", exec_, s); say((before - info()[0]) >> 20)
s, t = stream(), stream(); c, a, b = make(t, 96), make(s), make(s)
need("cuFuncLoad", spin); before = info()[0]
go(a, s); go(b, s); go(c, t); need("cuCtxSynchronize"); go(c, t)
"""
    assert machine.python(script) == ["64", "64", "160", "160"]


def test_cuda_bindings_capture_a_graph_with_memory(machine: Machine) -> None:
    """The graph allocates, writes, reads and frees memory at each launch."""
    pytest.importorskip("cuda.bindings")
    script = (
        BINDINGS
        + """
s = ok(D.cuStreamCreate(1)); out = bytearray(64)
ok(D.cuStreamBeginCapture(s, GLOBAL))
pointer = ok(D.cuMemAllocAsync(5 << 20, s))
ok(D.cuMemsetD8Async(pointer, 9, 64, s))
ok(D.cuMemcpyDtoHAsync(out, pointer, 64, s))
ok(D.cuMemFreeAsync(pointer, s))
status, id_, graph, needs, *_ = ok(D.cuStreamGetCaptureInfo(s))
say(status.name, len(needs), sum(out))
graph = ok(D.cuStreamEndCapture(s))
nodes, n = ok(D.cuGraphGetNodes(graph, 9))
say(n, [ok(D.cuGraphNodeGetType(node)).name[len("CU_GRAPH_NODE_TYPE_"):] for node in nodes[:n]])
exec_ = ok(D.cuGraphInstantiate(graph, 0))
for _ in range(3):
    out[:] = bytes(64)
    ok(D.cuGraphLaunch(exec_, s)); ok(D.cuStreamSynchronize(s)); say(sum(out), taken())
say(D.cuMemFree(pointer)[0].name)
ok(D.cuGraphExecDestroy(exec_)); ok(D.cuGraphDestroy(graph)); ok(D.cuDeviceGraphMemTrim(0)); say(taken())
"""
    )
    assert machine.python(script) == [
        "CU_STREAM_CAPTURE_STATUS_ACTIVE 1 0",
        "4 ['MEM_ALLOC', 'MEMSET', 'MEMCPY', 'MEM_FREE']",
        *["576 32"] * 3,
        "CUDA_ERROR_INVALID_VALUE",
        "0",
    ]


def test_cuda_bindings_build_a_graph_of_nodes(machine: Machine) -> None:
    pytest.importorskip("cuda.bindings")
    script = (
        BINDINGS
        + """
graph = ok(D.cuGraphCreate(0)); params = want(40 << 20)
a = ok(D.cuGraphAddMemAllocNode(graph, None, 0, params)); pointer = params.dptr
fill = D.CUDA_MEMSET_NODE_PARAMS()
fill.dst, fill.value, fill.elementSize, fill.width, fill.height = pointer, 3, 4, 16, 1
b = ok(D.cuGraphAddMemsetNode(graph, [a], 1, fill, context))
module = ok(D.cuModuleLoadData(b"any")); kernel = D.CUDA_KERNEL_NODE_PARAMS()
kernel.func = ok(D.cuModuleGetFunction(module, b"spin_20000us"))
kernel.gridDimX = kernel.gridDimY = kernel.gridDimZ = kernel.blockDimX = kernel.blockDimY = kernel.blockDimZ = 1
c = ok(D.cuGraphAddKernelNode(graph, [b], 1, kernel))
d = ok(D.cuGraphAddEmptyNode(graph, None, 0))
ok(D.cuGraphAddDependencies(graph, [c], [d], None, 1))
say(ok(D.cuGraphMemAllocNodeGetParams(a)).bytesize >> 20, D.cuGraphClone(graph)[0].name)
exec_ = ok(D.cuGraphInstantiate(graph, 0)); s = ok(D.cuStreamCreate(1)); ok(D.cuFuncLoad(kernel.func))
before = ok(D.cuMemGetInfo())[0]
ok(D.cuGraphUpload(exec_, s)); say(taken())
ok(D.cuGraphLaunch(exec_, s)); say(D.cuStreamQuery(s)[0].name, D.cuGraphLaunch(exec_, s)[0].name)
out = bytearray(64); ok(D.cuStreamSynchronize(s)); ok(D.cuMemcpyDtoH(out, pointer, 64)); say(sum(out), taken())
ok(D.cuMemFree(pointer)); say(taken()); ok(D.cuDeviceGraphMemTrim(0)); say(taken())
say(int(ok(D.cuDeviceGetGraphMemAttribute(0, D.CUgraphMem_attribute.CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH))) >> 20)
"""
    )
    assert machine.python(script) == [
        "40 CUDA_ERROR_NOT_SUPPORTED",
        "64",
        "CUDA_ERROR_NOT_READY CUDA_ERROR_INVALID_VALUE",
        "48 64",
        "64",
        "0",
        "64",
    ]
