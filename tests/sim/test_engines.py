"""Device time of copies, of graphs with copies and kernels, and of cooperative kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import Machine

pytestmark = pytest.mark.timed

# A copy between host and device moves 50 bytes in a nanosecond: 500 MB take 10 ms. A copy on the device moves 2000
# bytes: 20 GB take 10 ms. The simulator stores no contents of that size, so no data is really moved.
COPY = """
start(); s = stream(); n, much = 500_000_000, 20_000_000_000; host = C.create_string_buffer(8); at = alloc(much)
def copies(count, to=s):
    for _ in range(count):
        need("cuMemcpyHtoDAsync_v2", C.c_uint64(at.value + much - n), host, C.c_size_t(n), to)
def zeroes(to=s):
    need("cuMemsetD8Async", at, 0, C.c_size_t(much), to)
def recorded(to=s):
    event = C.c_void_p(); need("cuEventCreate", C.byref(event), 0); need("cuEventRecord", event, to); return event
def led(to=s):  # work that is queued after this kernel starts when the kernel ends, not at the program's call
    launch(kernel("spin_100000us")[1], to); return recorded(to)
def ms(first, last):
    need("cuEventSynchronize", last); found = C.c_float()
    need("cuEventElapsedTime", C.byref(found), first, last); return round(found.value)
"""


def test_a_copy_takes_its_time_in_its_stream(machine: Machine) -> None:
    script = """
f = kernel("spin_20000us")[1]; began = time.monotonic(); first = led(); copies(1); middle = recorded()
launch(f, s); last = recorded(); say(L.cuEventQuery(middle), ms(first, middle), ms(middle, last))
say(0.13 <= time.monotonic() - began < 0.14)
began = time.monotonic(); need("cuMemcpyHtoD_v2", C.c_uint64(at.value + much - n), host, C.c_size_t(n))
say(0.01 <= time.monotonic() - began < 0.02)
"""
    assert machine.python(COPY + script) == ["600 10 20", "True", "True"]


def test_a_copy_does_not_wait_for_kernels_of_other_streams(machine: Machine) -> None:
    script = """
f = kernel("spin_600000us")[1]; t = stream(); launch(f, s); began = time.monotonic()
copies(1, t); need("cuStreamSynchronize", t); say(0.01 <= time.monotonic() - began, L.cuStreamQuery(s))
"""
    assert machine.python(COPY + script) == ["True 600"]


def test_each_engine_runs_one_copy_after_another(machine: Machine) -> None:
    """Two copies in one direction take 20 ms; one to the device and one on it take 10 ms."""
    script = """
for other in (copies, lambda _, to: zeroes(to)):
    t = stream(); first = led()
    for to in (s, t): need("cuStreamWaitEvent", to, first, 0)
    copies(1, s); other(1, t); say(ms(first, recorded(t)))
"""
    assert machine.python(COPY + script) == ["20", "10"]


def test_copies_do_not_slow_kernels_of_other_contexts(make_machine: Callable[..., Machine]) -> None:
    """Another context's kernels run at full speed during copies of 0.3 s, although kernels wait for the copies."""
    machine = make_machine()
    copier = """
f = kernel("spin_1000us")[1]; say("ready"); wait(); began = time.monotonic()
for _ in range(6): copies(5); launch(f, s)
need("cuCtxSynchronize"); say(time.monotonic() - began)
"""
    worker = """
start(); f = kernel("spin_10000us")[1]; s = stream(); launch(f, s); need("cuCtxSynchronize"); say("ready"); wait()
began = time.monotonic()
for _ in range(20): launch(f, s)
need("cuCtxSynchronize"); say(time.monotonic() - began)
"""
    running = machine.together(COPY + copier, worker)
    copied, worked = (float(one.communicate(timeout=60)[0]) for one in running)
    assert 0.306 <= copied < 0.33
    assert 0.2 <= worked < 0.23  # six kernels, and the switches to them and back


def test_a_graph_takes_the_time_of_its_nodes(machine: Machine) -> None:
    """The graph has two kernels in sequence with a copy of 10 ms between them, and a parallel copy."""
    script = """
f, g = kernel("spin_20000us")[1], kernel("spin_5000us")[1]; t = stream(); graph, exec_ = C.c_void_p(), C.c_void_p()
need("cuStreamBeginCapture_v2", s, 2); fork = recorded(); need("cuStreamWaitEvent", t, fork, 0); launch(g, t)
launch(f, s); copies(1); launch(f, s); join = recorded(t); need("cuStreamWaitEvent", s, join, 0)
need("cuStreamEndCapture", s, C.byref(graph))
need("cuGraphInstantiateWithFlags", C.byref(exec_), graph, C.c_ulonglong(0))
first = led(); need("cuGraphLaunch", exec_, s); say(ms(first, recorded()))
"""
    assert machine.python(COPY + script) == ["50"]


def test_a_cooperative_kernel_must_fit_on_the_device(machine: Machine) -> None:
    """All blocks run at once: eight of 256 threads on each of 132 multiprocessors. Other kernels need not fit."""
    script = """
start(); f = kernel("spin_10us")[1]; n = C.c_int()
need("cuOccupancyMaxActiveBlocksPerMultiprocessor", C.byref(n), f, 256, C.c_size_t(0)); say(n.value)
for blocks in (132 * 8, 132 * 8 + 1):
    say(*(launch(f, blocks, 1, 1, 256, 1, 1, 0, None, None, *more) for launch, more in
        ((L.cuLaunchCooperativeKernel, ()), (L.cuLaunchKernel, (None,)))))
"""
    assert machine.python(script) == ["8", "0 0", "720 0"]


def test_a_launch_on_several_devices_starts_all_or_none(make_machine: Callable[..., Machine]) -> None:
    """Each kernel starts after the streams of all devices."""
    script = """
class Params(C.Structure):
    _fields_ = [("f", C.c_void_p), *((name, C.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
                ("stream", C.c_void_p), ("params", C.c_void_p)]
need("cuInit", 0); contexts, streams, kernels = [], [], []
for device in range(2):
    contexts.append(C.c_void_p()); need("cuDevicePrimaryCtxRetain", C.byref(contexts[-1]), device)
    need("cuCtxSetCurrent", contexts[-1]); streams.append(stream()); kernels.append(kernel("spin_20000us")[1])
def both(blocks=1, to=(0, 1)):
    list_ = (Params * 2)(*(Params(kernels[d], blocks, 1, 1, 32, 1, 1, 0, streams[d]) for d in to))
    return L.cuLaunchCooperativeKernelMultiDevice(list_, 2, 0)
say(both(to=(1, 1)), both(blocks=1 << 20), L.cuStreamQuery(streams[1])); need("cuCtxSetCurrent", contexts[0])
began = time.monotonic(); launch(kernels[0], streams[0]); say(both())
need("cuCtxSetCurrent", contexts[1]); need("cuStreamSynchronize", streams[1])
say(0.04 <= time.monotonic() - began < 0.06)
"""
    assert make_machine(FGPU_SIM_GPUS="2").python(script) == ["101 720 0", "0", "True"]
