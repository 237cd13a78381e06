"""Device time of copies, of graphs with copies and kernels, and of cooperative kernels."""

from __future__ import annotations

from collections.abc import Callable

from .conftest import Machine
from .device_time_kit import queue


def test_a_copy_takes_its_time_in_its_stream(machine: Machine) -> None:
    """A synchronous copy takes the same time. In the thread's stream, it does not wait for kernels elsewhere."""
    script = """
f = kernel("spin_20000us")[1]; s, t = stream(), stream(); began = time.monotonic()
first = led(s); copies(1, s); middle = recorded(s); launch(f, s); last = recorded(s); queued(first)
say(L.cuEventQuery(middle), ms(first, middle), ms(middle, last), time.monotonic() - began >= (LEAD_MS + 30) / 1000)
for call in ("cuMemcpyHtoD_v2", "cuMemcpyHtoD_v2_ptds"):
    began = time.monotonic(); need(call, C.c_uint64(at.value + much - n), host, C.c_size_t(n))
    say(time.monotonic() - began >= 0.01, L.cuStreamQuery(t))
    launch(kernel("spin_3600000000us")[1], t)
"""
    assert queue(machine, script) == ["600 10.0 20.0 True", "True 0", "True 600"]


def test_a_copy_does_not_wait_for_kernels_of_other_streams(machine: Machine) -> None:
    script = """
s, t = stream(), stream(); launch(kernel("spin_3600000000us")[1], s); first = paused(t); copies(1, t)
last = recorded(t); queued(first); say(ms(first, last), L.cuStreamQuery(s))
"""
    assert queue(machine, script) == ["10.0 600"]


def test_each_engine_runs_one_copy_after_another(machine: Machine) -> None:
    """Two copies in one direction take 20 ms; one to the device and one on it take 10 ms."""
    script = """
for other in (copies, lambda _, to: zeroes(to)):
    s, t = stream(), stream(); first = led(s); after(first, t); copies(1, s); other(1, t); last = recorded(t)
    queued(first); say(ms(first, last))
"""
    assert queue(machine, script) == ["20.0", "10.0"]


def test_copies_do_not_slow_kernels_of_other_contexts(machine: Machine) -> None:
    """Another context's kernels run at full speed during copies of 0.3 s, although kernels wait for the copies.

    Three of these kernels of 1 ms run during the other kernels. Each of them waits for a slice of 2 ms and a switch.
    """
    script = """
s, other = stream(), C.c_void_p(); f = kernel("spin_1000us")[1]; first = paused(s)
for _ in range(6): copies(5, s); launch(f, s)
copied = recorded(s); need("cuCtxCreate_v2", C.byref(other), 0, 0); t = stream(); g = kernel("spin_10000us")[1]
after(first, t)
for _ in range(20): launch(g, t)
worked = recorded(t); queued(first); say(ms(first, worked), ms(first, copied))
"""
    assert queue(machine, script) == [f"{200 + 3 * 1.18:.2f} {306 + 3 * 2.18:.2f}"]


def test_a_graph_takes_the_time_of_its_nodes(machine: Machine) -> None:
    """The graph has two kernels in sequence with a copy of 10 ms between them, and a parallel copy."""
    script = """
f, g = kernel("spin_20000us")[1], kernel("spin_5000us")[1]; s, t = stream(), stream()
graph, exec_ = C.c_void_p(), C.c_void_p(); need("cuStreamBeginCapture_v2", s, 2); fork = recorded(s); after(fork, t)
launch(g, t); launch(f, s); copies(1, s); launch(f, s); join = recorded(t); after(join, s)
need("cuStreamEndCapture", s, C.byref(graph))
need("cuGraphInstantiateWithFlags", C.byref(exec_), graph, C.c_ulonglong(0))
first = led(s); need("cuGraphLaunch", exec_, s); last = recorded(s); queued(first); say(ms(first, last))
"""
    assert queue(machine, script) == ["50.0"]


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
contexts, streams, kernels = [], [], []
for device in range(2):
    contexts.append(start(device)); streams.append(stream()); kernels.append(kernel("spin_20000us")[1])
def both(blocks=1, to=(0, 1)):
    list_ = (Params * 2)(*(Params(kernels[d], blocks, 1, 1, 32, 1, 1, 0, streams[d]) for d in to))
    return L.cuLaunchCooperativeKernelMultiDevice(list_, 2, 0)
say(both(to=(1, 1)), both(blocks=1 << 20), L.cuStreamQuery(streams[1])); need("cuCtxSetCurrent", contexts[0])
first = led(streams[0]); launch(kernels[0], streams[0]); done = both(); need("cuCtxSetCurrent", contexts[1])
last = recorded(streams[1]); queued(first); say(done, ms(first, last))
"""
    assert queue(make_machine(FGPU_SIM_GPUS="2"), script) == ["101 720 0", "0 40.0"]
