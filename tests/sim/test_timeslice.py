"""Several contexts on one device alternate. Their work adds up to the elapsed time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import Machine
from .device_time_kit import queue
from .faults_kit import order

# With a slice of 2 ms and a change of 0.18 ms, a context has 2 of 2.18 ms if others always have work.
SLICE, CHANGE = 2.0, 0.18

# Each of several contexts, on these devices, does the same work from the same moment on. Prints how long each took.
TOGETHER = """
contexts, firsts, lasts = [], [], []
for device in devices:
    c = C.c_void_p(); need("cuCtxCreate_v2", C.byref(c), 0, device); contexts.append(c)
    f = kernel("spin_%dus" % us)[1]; streams = [stream() for _ in range(parallel)]
    if not firsts: at = alloc(much); firsts.append(paused(streams[0]))
    after(firsts[0], *streams)
    for _ in range(deep):
        for s in streams: launch(f, s)
    lasts.append([recorded(s) for s in streams])
need("cuCtxSetCurrent", contexts[0]); queued(firsts[0]); took = []
for c, own in zip(contexts, lasts):
    need("cuCtxSetCurrent", c); took += [ms(firsts[0], last) for last in own]
say(*took)
"""

# Does 100 ms of work, in four kernels. Prints how long the first of them and all of them took.
FOUR = """
f = kernel("spin_25000us")[1]; s = stream(); began = time.monotonic(); first = paused(s)
launch(f, s); middle = recorded(s)
for _ in range(3): launch(f, s)
last = recorded(s); queued(first); all_ = ms(first, last); waited = 1000 * (time.monotonic() - began)
say(ms(first, middle), all_, waited >= LEAD_MS + all_)
"""


def together(machine: Machine, us: int, deep: int, devices: tuple[int, ...], parallel: int = 1) -> list[float]:
    """Let contexts work at the same time, each `deep` kernels of `us` in each stream. Return the times in ms."""
    script = f"us, deep, devices, parallel = {us}, {deep}, {devices}, {parallel}\n{TOGETHER}"
    (line,) = queue(machine, script)
    return sorted(map(float, line.split()))


@pytest.mark.parametrize(("us", "deep"), [(200, 500), (10_000, 20), (100_000, 2)])
def test_a_lone_context_works_all_of_the_time(machine: Machine, us: int, deep: int) -> None:
    assert together(machine, us, deep, (0,)) == [us * deep / 1000]


@pytest.mark.parametrize(("us", "deep"), [(2_000, 50), (10_000, 10), (100_000, 1)])
@pytest.mark.parametrize("number", [2, 3])
def test_contexts_share_the_device_and_lose_time_at_each_change(
    machine: Machine, number: int, us: int, deep: int
) -> None:
    """Each has the device for 50 slices. They end one after another, since all end with their last slice."""
    took = together(machine, us, deep, (0,) * number)
    slices = [50 * number - i for i in reversed(range(number))]
    assert took == pytest.approx([n * SLICE + (n - 1) * CHANGE for n in slices], abs=0.011)


@pytest.mark.parametrize(
    ("percent", "number", "part"), [(175, 1, 1.0), (175, 2, 1.75), (175, 3, 2.5), (100, 1, 1.0), (100, 2, 1.0)]
)
def test_contexts_that_run_side_by_side_slow_each_other_down(
    make_machine: Callable[..., Machine], percent: int, number: int, part: float
) -> None:
    took = together(make_machine(FGPU_SIM_PARALLEL=str(percent)), 20_000, 5, (0,) * number)
    assert took == pytest.approx([100 * part] * number, abs=0.02)


def test_contexts_on_different_devices_do_not_share_time(make_machine: Callable[..., Machine]) -> None:
    assert together(make_machine(FGPU_SIM_GPUS="2"), 10_000, 10, (0, 1)) == [100.0, 100.0]


def test_streams_of_one_context_run_in_parallel(machine: Machine) -> None:
    assert together(machine, 10_000, 10, (0,), parallel=3) == [100.0] * 3


def test_contexts_of_one_process_alternate(machine: Machine) -> None:
    """Two times 200 ms take 400 ms or more, both for queries of an event and for a wait for a stream."""
    script = """
c = start(); f = kernel("spin_200000us")[1]; s, e = stream(), C.c_void_p(); need("cuEventCreate", C.byref(e), 0)
d = C.c_void_p(); need("cuCtxCreate_v2", C.byref(d), 0, 0); g = kernel("spin_200000us")[1]; t = stream()
began = time.monotonic(); launch(g, t); need("cuCtxSetCurrent", c); launch(f, s); need("cuEventRecord", e, s)
while L.cuEventQuery(e) == 600: time.sleep(0.002)
one = time.monotonic() - began; need("cuCtxSetCurrent", d); need("cuStreamSynchronize", t)
say(one >= 0.39, time.monotonic() - began >= 0.4, L.cuStreamQuery(t))
"""
    assert machine.python(script) == ["True True 0"]


def test_events_show_the_real_duration(machine: Machine) -> None:
    """Event times include the turns of another process's context, as those of a real device do.

    This context waits first, and the other one has a slice before each of its 50 slices. Within a turn, the time of an
    event is estimated.
    """
    with machine.spawn("start(); launch(kernel('spin_3600000000us')[1]); say('up'); wait()") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "up\n"
        (line,) = queue(machine, FOUR)
        assert other.poll() is None
        other.kill()
    first, all_, waited = line.split()
    assert float(all_) == pytest.approx(100 * SLICE + 99 * CHANGE, abs=0.011)
    assert float(first) == pytest.approx(float(all_) / 4, abs=2 * (SLICE + CHANGE))
    assert waited == "True"


def test_work_of_a_killed_process_is_dropped(machine: Machine) -> None:
    """Its memory remains for a minute."""
    order(machine, "slow-end:60s")
    with machine.spawn("start(); launch(kernel('spin_3600000000us')[1]); say('up'); wait()") as hog:
        assert hog.stdout is not None
        assert hog.stdout.readline() == "up\n"
        hog.kill()
    machine.freed_after_us(hog.pid)
    assert queue(machine, FOUR) == ["25.0 100.0 True"]


def test_work_of_a_destroyed_context_is_dropped(machine: Machine) -> None:
    script = """
d = C.c_void_p(); need("cuCtxCreate_v2", C.byref(d), 0, 0); launch(kernel("spin_3600000000us")[1], stream())
need("cuCtxDestroy_v2", d); need("cuCtxSetCurrent", context)
"""
    assert queue(machine, script + FOUR) == ["25.0 100.0 True"]
