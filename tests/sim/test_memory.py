"""Memory of processes: sizes, exits, several processes at the same time, and full devices."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from .conftest import CLIENT, MIB, Machine, say
from .device_time_kit import queue
from .faults_kit import order

CONTEXT = 518 * MIB
# Bytes that an H200 uses in addition, in no process's row: for each context, and once while any process has initialized
# it.
CONTEXT_OVERHEAD = 5832704
OVERHEAD = 3407872


def test_the_dump_counts_every_kind_of_memory_separately(machine: Machine) -> None:
    script = """
start()
for size in (1000, 5 << 20, 70 << 10):
    alloc(size)
pointer, handle = C.c_uint64(), C.c_uint64()
need("cuMemAllocManaged", C.byref(pointer), C.c_size_t(64 << 20), 1)
class Prop(C.Structure):
    _fields_ = [("type", C.c_int), ("handles", C.c_int), ("where", C.c_int), ("id", C.c_int), ("spare", C.c_uint64 * 2)]
need("cuMemCreate", C.byref(handle), C.c_size_t(6 << 20), C.byref(Prop(1, 0, 1, 0)), C.c_uint64(0))
need("cuMemAllocAsync", C.byref(pointer), C.c_size_t(100), None)
say("holding")
wait()
"""
    with machine.spawn(script) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "holding\n"
        process = machine.process(client.pid)
        assert process["contexts"] == 1
        assert process["context_bytes"] == CONTEXT
        assert process["block_bytes"] == (2 + 6) * MIB
        assert process["block_requested_bytes"] == 1000 + 5 * MIB + 70 * 1024
        assert process["vmm_bytes"] == process["vmm_requested_bytes"] == 6 * MIB
        assert process["managed_bytes"] == 64 * MIB
        assert process["pool_bytes"] == 32 * MIB
        assert process["bytes"] == CONTEXT + (8 + 6 + 32) * MIB
        device = machine.dump()["devices"][0]
        assert device["used_bytes"] == process["bytes"] + device["driver_bytes"]
        client.kill()
    machine.settles_at(0)


def test_memory_of_a_killed_process_is_freed_80_to_200_ms_after_its_end(machine: Machine) -> None:
    """The first process is freed at that time. The second one is freed a minute later, so that its plan can be read."""
    for delay_s in (0, 60):
        if delay_s:
            order(machine, f"slow-end:{delay_s}s")
        with machine.spawn("start(); alloc(3 << 30); say('holding'); wait()") as client:
            assert client.stdout is not None
            client.stdout.readline()
            assert machine.process(client.pid)["freed_after_us"] == 0
            killed = time.monotonic()
            client.kill()
        if not delay_s:
            machine.settles_at(0)
            assert time.monotonic() - killed >= 0.08
    assert 80_000 <= machine.freed_after_us(client.pid) - 60_000_000 < 200_000
    assert machine.used() > 3 << 30


def test_exec_and_closed_descriptors_free_memory(machine: Machine) -> None:
    """A process that closes its connection frees its memory on the device, although the process continues."""
    for end in ("os.execvp('sleep', ['sleep', '60'])", "os.closerange(3, 1000); wait()"):
        with machine.spawn(f"start(); alloc(1 << 30); say('holding'); wait(); {end}") as client:
            assert client.stdout is not None
            client.stdout.readline()
            say(client)
            machine.settles_at(0)
            assert client.poll() is None
            client.kill()


def test_a_forked_child_gets_errors_and_does_not_affect_the_parent(machine: Machine) -> None:
    script = """
start(); alloc(1 << 30)
before = info()
if os.fork() == 0:
    pointer = C.c_uint64()
    say(L.cuInit(0), L.cuMemAlloc_v2(C.byref(pointer), C.c_size_t(1)), L.cuCtxSynchronize())
    os._exit(0)
os.wait(); time.sleep(0.15)
say(before == info())
"""
    assert machine.python(script) == ["3 3 3", "True"]


def test_a_child_that_outlives_its_parent_keeps_the_parent_s_memory(machine: Machine) -> None:
    """The child has the driver's descriptors, although it cannot use them."""
    script = """
start(); alloc(1 << 30)
if os.fork() == 0:
    os.close(1); os.close(2); wait(); os._exit(0)
say("ends"); os._exit(0)
"""
    with machine.spawn(script) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ends\n"
        client.wait()
        time.sleep(0.15)
        assert machine.process(client.pid)["bytes"] == CONTEXT + (1 << 30)
        assert machine.process(client.pid)["ended"]
        say(client)
        machine.settles_at(0)


def test_parent_and_child_of_a_fork_before_cuinit_can_both_use_the_driver(machine: Machine) -> None:
    script = """
if os.fork() == 0:
    start(); alloc(1 << 20); say("child"); os._exit(0)
os.wait(); start(); say("parent")
"""
    assert machine.python(script) == ["child", "parent"]


def test_a_full_device_refuses_allocations(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(FGPU_SIM_MEMORY="4GiB")
    script = """
start()
free, total = info()
whole = free >> 21 << 21
alloc(whole - (2 << 20))
pointer, context = C.c_uint64(), C.c_void_p()
say(L.cuMemAlloc_v2(C.byref(pointer), C.c_size_t(3 << 20)), L.cuCtxCreate_v2(C.byref(context), 0, 0))
alloc(2 << 20)
say(info()[0] == free - whole, L.cuMemAlloc_v2(C.byref(pointer), C.c_size_t(1)))
need("cuMemAllocManaged", C.byref(pointer), C.c_size_t(8 << 30), 1)
say("done")
wait()
"""
    with machine.spawn(script) as client:
        assert client.stdout is not None
        lines = [client.stdout.readline() for _ in range(3)]
        assert lines == ["2 2\n", "True 2\n", "done\n"]
        assert machine.python("start()", check=False) == ["failed cuDevicePrimaryCtxRetain 2"]
        client.kill()
    machine.settles_at(0)
    assert machine.python("start(); say('room')") == ["room"]


def test_the_memory_of_two_processes_adds_up_on_a_device(machine: Machine) -> None:
    with machine.spawn("start(); alloc(10 << 30); say('holding'); wait()") as client:
        assert client.stdout is not None
        client.stdout.readline()
        free, total = map(int, machine.python("start(); say(*info())")[0].split())
        assert total == 150109880320
        assert total - free == (10 << 30) + 2 * (CONTEXT + CONTEXT_OVERHEAD) + OVERHEAD
        client.kill()


def test_the_end_of_a_context_frees_exactly_its_own_memory(machine: Machine) -> None:
    script = """
start(); alloc(8 << 20); base = info()[0]
context = C.c_void_p()
need("cuCtxCreate_v2", C.byref(context), 0, 0)
for _ in range(23):
    alloc(1009); alloc(3 << 20)
need("cuCtxDestroy_v2", context)
say(base == info()[0])
"""
    assert machine.python(script) == ["True"]


def test_fragmented_room_in_a_granule_is_not_used(machine: Machine) -> None:
    """A granule with enough free bytes that are not contiguous is skipped. The allocation gets a new granule."""
    script = """
start(); held = [alloc(128 << 10) for _ in range(16)]
[need("cuMemFree_v2", p) for p in held[::2]]
big = alloc(512 << 10); pointers = sorted(p.value for p in held[1::2])
out = C.create_string_buffer(b"x" * (512 << 10))
need("cuMemcpyHtoD_v2", big, out, C.c_size_t(512 << 10))
say(big.value % (2 << 20), any(abs(big.value - p) < 512 << 10 for p in pointers))
"""
    assert machine.python(script) == ["0 False"]


def test_threads_allocate_in_parallel_after_each_has_set_its_current_context(machine: Machine) -> None:
    """Contexts are current per thread. Nothing is lost in parallel calls."""
    script = """
import threading
context = start(); base = info()[0]
wrong = []
def work():
    if L.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(1)) != 201:
        wrong.append("context leaked into thread")
    need("cuCtxSetCurrent", context)
    for i in range(101):
        held = [alloc(size) for size in (1, 700, 70000, 3 << 20)]
        for pointer in held:
            need("cuMemFree_v2", pointer)
threads = [threading.Thread(target=work) for _ in range(7)]
[t.start() for t in threads]; [t.join() for t in threads]
say(wrong, base == info()[0])
"""
    assert machine.python(script) == ["[] True"]


def test_many_clients_leave_no_leak(machine: Machine) -> None:
    """200 clients run at the same time, then 500 short ones. Memory is freed, and the server does not grow."""
    forking = """
children = []
for _ in range(200):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        start(); alloc(1 << 20); os.write(write, b"x"); time.sleep(60); os._exit(0)
    os.read(read, 1); os.close(read); os.close(write); children.append(child)
say("holding"); wait()
for child in children:
    os.kill(child, 9); os.wait()
"""
    before = machine.descriptors()
    with machine.spawn(forking) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "holding\n"
        processes = machine.dump()["processes"]
        assert len(processes) == 200
        assert {p["bytes"] for p in processes} == {CONTEXT + 2 * MIB}
        say(client)
        client.wait(timeout=30)
    machine.settles_at(0)
    resident = machine.resident()
    lives = """
for _ in range(500):
    if not os.fork():
        start(); alloc(5 << 20); os._exit(0)
    os.wait()
"""
    machine.python(lives)
    machine.settles_at(0)
    machine.has_descriptors(before)
    assert machine.resident() - resident < MIB


@pytest.mark.parametrize(
    ("model", "name", "total"), [("t4", "Tesla T4", 15360), ("a100", "NVIDIA A100-SXM4-80GB", 81920)]
)
def test_each_model_has_its_properties(make_machine: Callable[..., Machine], model: str, name: str, total: int) -> None:
    machine = make_machine(FGPU_SIM_MODEL=model, FGPU_SIM_GPUS="3")
    devices = machine.dump()["devices"]
    assert [d["name"] for d in devices] == [name] * 3
    assert [d["total_bytes"] for d in devices] == [total * MIB] * 3
    assert len({d["uuid"] for d in devices}) == 3
    with machine.spawn("start(2); alloc(1 << 30); say('holding'); wait()") as client:
        assert client.stdout is not None
        client.stdout.readline()
        assert machine.process(client.pid, device=2)["block_bytes"] == 1 << 30
        assert machine.used(0) == machine.used(1) < 8 * MIB
        client.kill()


def test_a_device_has_the_same_uuid_at_every_start(make_machine: Callable[..., Machine]) -> None:
    first, second = make_machine(FGPU_SIM_GPUS="2"), make_machine(FGPU_SIM_GPUS="2")
    uuids = [d["uuid"] for d in first.dump()["devices"]]
    assert uuids == [d["uuid"] for d in second.dump()["devices"]]
    assert len(set(uuids)) == 2


def test_programs_get_errors_without_a_server(machine: Machine) -> None:
    """CUDA finds no device and NVML no driver without a server. If the server dies, programs get errors."""
    script = """
N = C.CDLL("libnvidia-ml.so.1")
say(L.cuInit(0), N.nvmlInit_v2())
"""
    alone = machine.run(
        "unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run; exec "$0" -c "$1"', sys.executable, CLIENT + script
    )
    assert alone.stdout == "100 9\n"
    with machine.spawn(
        "start(); say('up'); wait(); say(L.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(1)) > 0)"
    ) as client:
        assert client.stdout is not None
        client.stdout.readline()
        assert machine.stop() == 0
        say(client)
        assert client.stdout.readline() == "True\n"


def test_kernels_take_the_requested_time(machine: Machine) -> None:
    """Other kernels take none. No launch waits for a kernel."""
    script = """
spin, other = kernel("spin_50000us")[1], kernel("other")[1]; first = led()
launch(spin); middle = recorded(); launch(other); last = recorded(); queued(first)
say(L.cuStreamQuery(None), ms(first, middle), ms(middle, last))
began = time.monotonic(); launch(spin); need("cuCtxSynchronize"); say(time.monotonic() - began >= 0.05)
launch(other); say(L.cuStreamQuery(None))
"""
    assert queue(machine, script) == ["600 50.0 0.0", "True", "0"]


def test_arrays_use_extent_times_format_in_granules(machine: Machine) -> None:
    """Small arrays share granules, levels add up, and the end of the context frees them."""
    script = """
class Shape(C.Structure):
    _fields_ = [("width", C.c_size_t), ("height", C.c_size_t), ("depth", C.c_size_t),
                ("format", C.c_int), ("channels", C.c_uint), ("flags", C.c_uint)]
FLOAT = 0x20
start(); before = info()[0]
def taken():
    return (before - info()[0]) / (1 << 20)
arrays = [C.c_void_p() for _ in range(4)]
need("cuArray3DCreate_v2", C.byref(arrays[0]), C.byref(Shape(4096, 4096, 0, FLOAT, 1, 0))); say(taken())
need("cuArray3DCreate_v2", C.byref(arrays[1]), C.byref(Shape(64, 64, 4, FLOAT, 4, 0))); say(taken())
need("cuArray3DCreate_v2", C.byref(arrays[2]), C.byref(Shape(64, 0, 0, FLOAT, 1, 0))); say(taken())
need("cuMipmappedArrayCreate", C.byref(arrays[3]), C.byref(Shape(4096, 4096, 0, FLOAT, 1, 0)), 3); say(taken())
bad = [Shape(0, 1, 1, FLOAT, 1, 0), Shape(4, 4, 4, 99, 1, 0), Shape(4, 4, 4, FLOAT, 3, 0)]
bad += [Shape(1 << 62, 4, 0, FLOAT, 1, 0)]
say([L.cuArray3DCreate_v2(C.byref(C.c_void_p()), C.byref(shape)) for shape in bad])
for array in arrays[:3]:
    need("cuArrayDestroy", array)
say(L.cuArrayDestroy(arrays[0]), L.cuArrayDestroy(arrays[3]), L.cuMipmappedArrayDestroy(arrays[3]), taken())
need("cuArray3DCreate_v2", C.byref(arrays[0]), C.byref(Shape(64, 64, 0, FLOAT, 1, 0)))
need("cuDevicePrimaryCtxReset_v2", 0)
say(L.cuArrayDestroy(arrays[0]))
"""
    assert machine.python(script) == ["64.0", "66.0", "66.0", "150.0", "[1, 1, 1, 1]", "400 400 0 0.0", "400"]
