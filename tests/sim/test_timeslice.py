"""Several contexts on one device alternate. Their work adds up to the elapsed time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from .conftest import Machine

pytestmark = pytest.mark.timed

# Does work of `us` microseconds at a time for `seconds`, `deep` launches ahead. Prints how much was done, in ms.
WORKER = """
start(); f = kernel("spin_%dus" % us)[1]; streams = [stream() for _ in range(n)]
launch(f, streams[0]); need("cuCtxSynchronize"); say("ready"); wait()
began, done = time.monotonic(), 0
while time.monotonic() < began + seconds:
    for _ in range(deep):
        for s in streams: launch(f, s)
    need("cuCtxSynchronize"); done += deep
say(done * us / 1000, 1000 * (time.monotonic() - began))
"""


def together(machine: Machine, *programs: str) -> tuple[list[float], float]:
    """Start programs at the same moment. Return how much work each did, and how long the last one took, in ms."""
    running = machine.together(*programs)
    said = [[float(word) for word in one.communicate(timeout=60)[0].split()] for one in running]
    return [done for done, _ in said], max(took for _, took in said)


def worker(us: int, deep: int, seconds: float = 1.0, n: int = 1) -> str:
    return f"us, deep, seconds, n = {us}, {deep}, {seconds}, {n}\n" + WORKER


@pytest.mark.parametrize(("us", "deep"), [(200, 500), (10_000, 20), (100_000, 2)])
def test_a_lone_context_works_at_least_90_percent_of_the_time(
    make_machine: Callable[..., Machine], us: int, deep: int
) -> None:
    (done,), took = together(make_machine(), worker(us, deep))
    assert 0.9 * took <= done <= took


@pytest.mark.parametrize(("us", "deep"), [(2_000, 40), (20_000, 3), (100_000, 1)])
def test_two_contexts_share_the_device_and_lose_time_at_each_change(
    make_machine: Callable[..., Machine], us: int, deep: int
) -> None:
    """Two of every 2.18 ms are work, except at the end, when one program may be alone with its last round."""
    (a, b), took = together(make_machine(), worker(us, deep, 3.0), worker(us, deep, 3.0))
    last = us * deep / 1000
    assert 0.8 * took <= a + b <= took * 2 / 2.18 + last
    assert abs(a - b) <= 0.1 * (a + b) + last
    assert took * 2 / 2.18 + last < took  # otherwise the sum would also hold for a device that loses no time


@pytest.mark.parametrize(("number", "part"), [(1, 1.0), (2, 1 / 1.75), (3, 1 / 2.5)])
def test_contexts_that_run_side_by_side_slow_each_other_down(
    make_machine: Callable[..., Machine], number: int, part: float
) -> None:
    workers = [worker(20_000, 5, 2.0) for _ in range(number)]
    done, took = together(make_machine(FGPU_SIM_PARALLEL="175"), *workers)
    assert done == pytest.approx([part * took] * number, rel=0.1)


def test_contexts_side_by_side_can_take_no_time_from_each_other(make_machine: Callable[..., Machine]) -> None:
    done, took = together(make_machine(FGPU_SIM_PARALLEL="100"), *[worker(10_000, 3, 2.0) for _ in range(2)])
    assert min(done) >= 0.9 * took


def test_three_contexts_share_the_device(make_machine: Callable[..., Machine]) -> None:
    done, took = together(make_machine(), *[worker(10_000, 3, 2.0) for _ in range(3)])
    assert 0.8 * took <= sum(done) <= 0.95 * took
    assert max(done) < 1.3 * min(done)


def test_contexts_on_different_devices_do_not_share_time(make_machine: Callable[..., Machine]) -> None:
    other = worker(10_000, 3).replace("start()", "start(1)")
    done, took = together(make_machine(FGPU_SIM_GPUS="2"), worker(10_000, 3), other)
    assert min(done) >= 0.85 * took


def test_streams_of_one_context_run_in_parallel(make_machine: Callable[..., Machine]) -> None:
    (done,), took = together(make_machine(), worker(10_000, 3, n=3))
    assert 0.9 * took <= done <= took


def test_contexts_of_one_process_alternate(make_machine: Callable[..., Machine]) -> None:
    """Two times 200 ms take about 400 ms, both for queries of an event and for a wait for a stream."""
    script = """
c = start(); f = kernel("spin_200000us")[1]; s, e = stream(), C.c_void_p(); need("cuEventCreate", C.byref(e), 0)
d = C.c_void_p(); need("cuCtxCreate_v2", C.byref(d), 0, 0); g = kernel("spin_200000us")[1]; t = stream()
began = time.monotonic(); launch(g, t); need("cuCtxSetCurrent", c); launch(f, s); need("cuEventRecord", e, s)
while L.cuEventQuery(e) == 600: time.sleep(0.002)
one = time.monotonic() - began; need("cuCtxSetCurrent", d); need("cuStreamSynchronize", t)
print(one, time.monotonic() - began, L.cuStreamQuery(t))
"""
    (line,) = make_machine().python(script)
    one, both, state = line.split()
    assert 0.40 < float(both) < 0.52
    assert 0.39 < float(one) < 0.52
    assert state == "0"


def test_events_show_the_real_duration(make_machine: Callable[..., Machine]) -> None:
    """Event times include the turns of other contexts, as those of a real device do."""
    other = worker(10_000, 3, 1.0)
    timed = """
start(); f = kernel("spin_50000us")[1]; s = stream(); events = [C.c_void_p(), C.c_void_p(), C.c_void_p()]
for e in events: need("cuEventCreate", C.byref(e), 0)
def between(a, b):
    ms = C.c_float(); need("cuEventElapsedTime", C.byref(ms), a, b); return ms.value
say("ready"); wait(); time.sleep(0.2); began = time.monotonic()
need("cuEventRecord", events[0], s); launch(f, s); need("cuEventRecord", events[1], s)
for _ in range(3): launch(f, s)
need("cuEventRecord", events[2], s); need("cuStreamSynchronize", s); took = 1000 * (time.monotonic() - began)
say(between(events[0], events[1]), between(events[0], events[2]), took)
"""
    running = make_machine().together(other, timed)
    first, all_, took = (float(word) for word in running[1].communicate(timeout=30)[0].split())
    running[0].communicate(timeout=30)
    assert 0.9 * took < all_ <= took + 1
    assert took > 1.2 * 200  # the other context was busy
    assert 0.15 * all_ < first < 0.4 * all_  # about one of four


def test_work_of_a_killed_process_is_dropped(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    hog = machine.spawn("start(); launch(kernel('spin_60000000us')[1]); say('up'); wait()")
    assert hog.stdout is not None
    assert hog.stdout.readline() == "up\n"
    with machine.spawn(
        "start(); f = kernel('spin_300000us')[1]; s = stream(); launch(f, s); say('up'); b = time.monotonic()\n"
        "need('cuStreamSynchronize', s); say(time.monotonic() - b)"
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "up\n"
        time.sleep(0.2)
        hog.kill()
        hog.communicate()
        took = float(other.communicate(timeout=30)[0])
    assert 0.35 < took < 0.52  # half of the first 0.2 s is its own


def test_work_of_a_destroyed_context_is_dropped(make_machine: Callable[..., Machine]) -> None:
    script = """
c = start(); f = kernel("spin_100000us")[1]; s = stream()
d = C.c_void_p(); need("cuCtxCreate_v2", C.byref(d), 0, 0); launch(kernel("spin_60000000us")[1], stream())
need("cuCtxDestroy_v2", d); need("cuCtxSetCurrent", c)
began = time.monotonic(); launch(f, s); need("cuStreamSynchronize", s); print(time.monotonic() - began)
"""
    (took,) = make_machine().python(script)
    assert 0.1 <= float(took) < 0.15
