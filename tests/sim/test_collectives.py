"""Kernels that run only together, each on its own device. Each waits until the others have started."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import CLIENT, Machine
from .device_time_kit import queue
from .faults_kit import order

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


def times(line: str) -> list[float]:
    return [float(word) for word in line.split()]


def test_a_kernel_spins_until_its_twin_has_started(pair: Machine) -> None:
    """The twin starts when the pause of its stream is over. Devices that wait for each other are up to 0.1 ms apart."""
    script = """
meet(0); one = event(0); on(1); first = paused(streams[1]); meet(1); two = event(1); time.sleep(0.05)
say(state(0), L.cuEventQuery(one)); queued(first); say(ms(first, one), ms(first, two))
settle(0, 1); say(state(0), state(1), L.cuEventQuery(one))
"""
    before, took, after = queue(pair, PAIR + script)
    assert (before, after) == ("600 600", "0 0 0")
    assert all(1 <= ms <= 1.2 for ms in times(took))


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
on(0); first = paused(streams[0]); on(1); after(first, streams[1])
for _ in range(100): meet(0); meet(1)
last = [event(device) for device in range(2)]; queued(first); say(*(ms(first, one) for one in last))
"""
    (took,) = queue(pair, PAIR + script)
    assert all(100 <= ms < 140 for ms in times(took))


def test_a_stream_works_normally_after_twin_kernels(pair: Machine) -> None:
    script = """
meet(0); meet(1); settle(); on(0); first = paused(streams[0]); spin(0); last = event(0); queued(first)
say(ms(first, last))
on(0); first = paused(streams[0]); meet(0); spin(0); last = event(0); meet(1); queued(first); on(0)
need("cuCtxSynchronize"); say(ms(first, last))
"""
    alone, behind = queue(pair, PAIR + script)
    assert alone == "20.0"
    assert 21 <= float(behind) <= 21.2


def test_kernels_of_several_processes_wait_for_each_other(pair: Machine) -> None:
    """The kernels of the first process wait until those of the second one start."""
    own = PAIR.replace('"meet_7_2_1000us"', '"meet_%d_2_1000us" % LEAD_MS')  # a key for each run of the script
    other = f"""
LEAD_MS = int(sys.argv[1]); C.CDLL(None).prctl(1, 9)  # it ends with the process that starts it
{own}
for _ in range(20): meet(0)
last = event(0); time.sleep(0.05); say(state(0), L.cuEventQuery(last)); settle(0); say(state(0), L.cuEventQuery(last))
"""
    script = f"""
import subprocess
other = subprocess.Popen([sys.executable, "-c", {CLIENT + other!r}, str(LEAD_MS)], stdout=subprocess.PIPE, text=True)
before = other.stdout.readline().split()
{own}
on(1); first = paused(streams[1])
for _ in range(20): meet(1)
last = event(1); queued(first); say(*before, *other.stdout.readline().split()); say(ms(first, last))
"""
    states, took = queue(pair, script)
    assert states == "600 600 0 0"
    assert 20 <= float(took) < 24


def test_a_spinning_kernel_occupies_the_device(pair: Machine) -> None:
    """A spinning kernel uses the device as a real one does. Another context gets half, and all of it after a kill.

    Of each 2.18 ms, 2 ms are work.
    """
    script = """
on(0); first = paused(streams[0])
for _ in range(5): spin(0)
last = event(0); queued(first); say(ms(first, last))
"""
    order(pair, "slow-end:60s")
    with pair.spawn(PAIR + "meet(0); say('up'); wait()") as hog:
        assert hog.stdout is not None
        assert hog.stdout.readline() == "up\n"
        assert queue(pair, PAIR + script) == [f"{2 * 100 + 99 * 0.18:.2f}"]
        hog.kill()
    pair.freed_after_us(hog.pid)
    assert queue(pair, PAIR + script) == ["100.0"]


def test_two_programs_without_gates_complete(pair: Machine) -> None:
    """The devices alternate between the programs. Both complete: a kernel that started once counts as started."""
    script = """
say("ready"); wait(); began = time.monotonic()
for _ in range(50): meet(0); meet(1)
settle(); say(began, time.monotonic())
"""
    running = pair.together(*(PAIR.replace("meet_7", f"meet_{key}") + script for key in (11, 12)))
    began, ended = zip(*(times(one.communicate(timeout=60)[0]) for one in running), strict=True)
    assert max(ended) - min(began) >= 0.1


def test_a_full_queue_blocks_the_launch(pair: Machine) -> None:
    script = """
import threading
def many():
    for _ in range(1100): meet(0)
    said.append(1)
said = []; t = threading.Thread(target=many); t.start(); time.sleep(0.3); say(said); began = time.monotonic()
for _ in range(1100): meet(1)
t.join(); settle(); say(said, time.monotonic() - began >= 1.1)
"""
    assert pair.python(PAIR + script) == ["[]", "[1] True"]


def test_a_third_kernel_of_a_pair_and_a_group_of_17_kernels_are_refused(pair: Machine) -> None:
    script = """
meet(0); meet(1); on(0); other = C.c_void_p(); need("cuCtxCreate_v2", C.byref(other), 0, 0)
say(launch(kernel("meet_7_2_1000us")[1])); say(launch(kernel("meet_8_17_1000us")[1])); settle()
"""
    assert pair.python(PAIR + script) == ["1", "1"]
