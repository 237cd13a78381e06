"""Kernels that run only together, each on its own device. Each waits until the others have started."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from .conftest import Machine, say

pytestmark = pytest.mark.timed

# Both devices, a kernel that waits for its twin there, and an independent kernel.
PAIR = """
need("cuInit", 0); contexts, streams, meets, spins = [], [], [], []
for device in range(2):
    c = C.c_void_p(); need("cuDevicePrimaryCtxRetain", C.byref(c), device); need("cuCtxSetCurrent", c)
    contexts.append(c); streams.append(stream()); meets.append(kernel("meet_7_2_1000us")[1])
    spins.append(kernel("spin_20000us")[1])
def on(device): need("cuCtxSetCurrent", contexts[device])
def meet(device): on(device); need("cuLaunchKernel", meets[device], 1, 1, 1, 1, 1, 1, 0, streams[device], None, None)
def spin(device): on(device); need("cuLaunchKernel", spins[device], 1, 1, 1, 1, 1, 1, 0, streams[device], None, None)
def state(device): on(device); return L.cuStreamQuery(streams[device])
def settle(*devices):
    for d in devices or range(2): on(d); need("cuStreamSynchronize", streams[d])
def event(device):
    e = C.c_void_p(); on(device); need("cuEventCreate", C.byref(e), 0)
    need("cuEventRecord", e, streams[device]); return e
"""


@pytest.fixture
def pair(make_machine: Callable[..., Machine]) -> Machine:
    return make_machine(FGPU_SIM_GPUS="2")


def test_a_kernel_spins_until_its_twin_has_started(pair: Machine) -> None:
    script = """
meet(0); one = event(0); time.sleep(0.05); say(state(0), L.cuEventQuery(one)); began = time.monotonic()
meet(1); settle(0, 1); say(0.001 <= time.monotonic() - began < 0.02, state(0), state(1), L.cuEventQuery(one))
"""
    assert pair.python(PAIR + script) == ["600 600", "True 0 0 0"]


def test_later_kernels_wait_and_each_meets_the_twin_of_its_round(pair: Machine) -> None:
    script = """
start = event(0); meet(0); first = event(0); spin(0); last = event(0); meet(0); time.sleep(0.05)
say(L.cuEventQuery(first), L.cuEventQuery(last)); spin(1); meet(1); settle(1); need("cuEventSynchronize", last)
passed = C.c_float(); need("cuEventElapsedTime", C.byref(passed), start, first); say(passed.value >= 70)
time.sleep(0.05); say(state(0), state(1)); meet(1); settle(); say(state(0))
"""
    assert pair.python(PAIR + script) == ["600 600", "True", "600 0", "0"]


def test_a_hundred_twin_kernels_of_1_ms_take_100_to_140_ms(pair: Machine) -> None:
    script = """
began = time.monotonic()
for _ in range(100): meet(0); meet(1)
settle(); say(time.monotonic() - began)
"""
    (took,) = pair.python(PAIR + script)
    assert 0.1 <= float(took) < 0.14


def test_a_stream_works_normally_after_twin_kernels(pair: Machine) -> None:
    script = """
meet(0); meet(1); settle(); began = time.monotonic(); spin(0); e = event(0); need("cuEventSynchronize", e)
say(0.02 <= time.monotonic() - began < 0.03); began = time.monotonic(); meet(0); spin(0); meet(1); on(0)
need("cuCtxSynchronize"); say(0.02 <= time.monotonic() - began < 0.03)
"""
    assert pair.python(PAIR + script) == ["True", "True"]


def test_kernels_of_several_processes_wait_for_each_other(pair: Machine) -> None:
    script = """
d = %d; say("ready"); wait(); began = time.monotonic()
for _ in range(20): meet(d)
settle(d); say(began, time.monotonic())
"""
    running = pair.together(*(PAIR + script % device for device in range(2)), apart=0.05)
    times = [tuple(map(float, one.communicate(timeout=30)[0].split())) for one in running]
    both_began = max(began for began, _ in times)
    for _, ended in times:
        assert 0.02 <= ended - both_began < 0.05


def test_a_spinning_kernel_occupies_the_device(pair: Machine) -> None:
    """A spinning kernel uses the device as a real one does. Another context gets half, and all of it after a kill."""
    hog = pair.spawn(PAIR + "meet(0); say('up'); wait()")
    assert hog.stdout is not None
    assert hog.stdout.readline() == "up\n"
    script = """
for _ in range(2):
    began = time.monotonic(); [spin(0) for _ in range(5)]; settle(0); say(time.monotonic() - began); wait()
"""
    with pair.spawn(PAIR + script) as other:
        assert other.stdout is not None
        beside = float(other.stdout.readline())
        hog.kill()
        hog.communicate()
        time.sleep(0.2)
        say(other, "\n")
        alone = float(other.stdout.readline())
        other.communicate(timeout=30)
    assert 0.19 <= beside < 0.26
    assert 0.1 <= alone < 0.12


def test_two_programs_without_gates_complete(pair: Machine) -> None:
    """The devices alternate between the programs. Both complete: a kernel that started once counts as started."""
    script = """
say("ready"); wait(); began = time.monotonic()
for _ in range(50): meet(0); meet(1)
settle(); say(time.monotonic() - began)
"""
    running = pair.together(*(PAIR.replace("meet_7", f"meet_{key}") + script for key in (11, 12)))
    took = [float(one.communicate(timeout=60)[0]) for one in running]
    assert max(took) >= 0.1


def test_a_full_queue_blocks_the_launch(pair: Machine) -> None:
    script = """
import threading
def many():
    for _ in range(1100): meet(0)
    said.append(1)
said = []; t = threading.Thread(target=many); t.start(); time.sleep(0.3); say(said); began = time.monotonic()
for _ in range(1100): meet(1)
t.join(); settle(); say(said, time.monotonic() - began < 3)
"""
    assert pair.python(PAIR + script) == ["[]", "[1] True"]


def test_a_third_kernel_of_a_pair_and_a_group_of_17_kernels_are_refused(pair: Machine) -> None:
    script = """
meet(0); meet(1); on(0); other = C.c_void_p(); need("cuCtxCreate_v2", C.byref(other), 0, 0)
say(launch(kernel("meet_7_2_1000us")[1])); say(launch(kernel("meet_8_17_1000us")[1])); settle()
"""
    assert pair.python(PAIR + script) == ["1", "1"]
