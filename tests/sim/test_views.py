"""Output of third-party programs with the simulated driver, and other processes' rows in a pid namespace."""

from __future__ import annotations

import re
import sys
from subprocess import Popen

import pytest

from .conftest import CLIENT, MIB, Machine, say

pytest.importorskip("pynvml")

NVML = """
import pynvml as N
N.nvmlInit()
device = N.nvmlDeviceGetHandleByIndex(0)
def processes():
    return sorted((p.pid, p.usedGpuMemory >> 20) for p in N.nvmlDeviceGetComputeRunningProcesses(device))
"""


def test_nvml_returns_host_pids(machine: Machine, holder: Popen[str]) -> None:
    assert machine.python(NVML + "say(processes())") == [f"[({holder.pid}, 618)]"]


def test_both_versions_of_the_memory_query_return_their_figures(machine: Machine, holder: Popen[str]) -> None:
    """The old version counts the driver's reserve as used. The new version shows it separately."""
    script = (
        NVML
        + """
old, new = N.nvmlDeviceGetMemoryInfo(device), N.nvmlDeviceGetMemoryInfo(device, version=N.nvmlMemory_v2)
say(old.total - new.total, old.free - new.free, old.used - new.used, new.reserved, new.used >> 20)
"""
    )
    assert machine.python(script) == ["0 0 644939776 644939776 626"]


def test_an_ended_context_is_not_listed(machine: Machine) -> None:
    script = NVML + "start(); say(len(processes())); need('cuDevicePrimaryCtxReset_v2', 0); say(len(processes()))"
    assert machine.python(script) == ["1", "0"]


def in_pid_namespace(script: str, proc: bool = True) -> list[str]:
    flags = ["--mount-proc"] if proc else []
    return ["unshare", "--pid", "--fork", *flags, sys.executable, "-c", CLIENT + NVML + script]


def test_a_pid_namespace_lists_its_own_processes(machine: Machine, holder: Popen[str]) -> None:
    """Inside, processes have the namespace's pids. The host lists all of them, with its own pids."""
    script = "start(); alloc(5 << 20); say(os.getpid(), processes()); say('up'); wait()"
    words = in_pid_namespace(script)
    with machine.spawn("", prefix=[*words, "--"]) as inside:
        assert inside.stdout is not None
        assert inside.stdout.readline() == "1 [(1, 524)]\n"
        inside.stdout.readline()
        pids = [p["pid"] for p in machine.dump()["processes"]]
        assert holder.pid in pids
        assert len(pids) == 2
        listed = machine.python(NVML + "say(processes())")[0]
        assert re.findall(r"\((\d+),", listed) == [str(pid) for pid in sorted(pids)]
        say(inside)


def test_sibling_namespaces_do_not_list_each_other_s_processes(machine: Machine) -> None:
    script = "start(); say('up'); wait(); say(processes()); say('seen'); wait()"
    words = [*in_pid_namespace(script), "--"]
    with machine.spawn("", prefix=words) as one, machine.spawn("", prefix=words) as other:
        for client in (one, other):
            assert client.stdout is not None
            assert client.stdout.readline() == "up\n"
        for client in (one, other):
            assert client.stdout is not None
            say(client)
            assert client.stdout.readline() == "[(1, 518)]\n"
            client.stdout.readline()
        for client in (one, other):
            say(client)


def test_nvml_lists_no_process_in_a_pid_namespace_with_the_host_s_proc(machine: Machine, holder: Popen[str]) -> None:
    done = machine.run(*in_pid_namespace("start(); say(processes())", proc=False))
    assert done.stdout == "[]\n"


def test_an_outer_pid_namespace_lists_inner_processes_with_its_own_pids(machine: Machine) -> None:
    """The middle one of two levels lists the innermost process with the middle level's pid."""
    inner = "start(); say('up'); time.sleep(30)"
    script = f"""
import subprocess
inner = {CLIENT + inner!r}
words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", inner]
child = subprocess.Popen(words, stdout=-1)
child.stdout.readline()
say(len(processes()), all(os.path.exists(f"/proc/{{pid}}") for pid, _ in processes()))
child.kill()
"""
    assert machine.run(*in_pid_namespace(script)).stdout == "1 True\n"


def test_process_lists_return_the_needed_size(machine: Machine, holder: Popen[str]) -> None:
    script = """
N = C.CDLL("libnvidia-ml.so.1")
need_nvml = lambda result: result and sys.exit(result)
need_nvml(N.nvmlInit_v2())
device, count = C.c_void_p(), C.c_uint(0)
need_nvml(N.nvmlDeviceGetHandleByIndex_v2(0, C.byref(device)))
for name, width in (("", 16), ("_v2", 24), ("_v3", 24)):
    ask = getattr(N, "nvmlDeviceGetComputeRunningProcesses" + name)
    count.value = 0
    few = ask(device, C.byref(count), None)
    room = (C.c_uint64 * 8)(*[77] * 8)
    count.value = 1
    say(few, ask(device, C.byref(count), room), count.value, room[0] & 0xFFFFFFFF, room[1] >> 20, room[width // 8])
"""
    assert machine.python(script) == [f"7 0 1 {holder.pid} 618 77"] * 3


def test_every_kind_of_process_list_has_the_expected_processes(machine: Machine, holder: Popen[str]) -> None:
    """Every process with a context computes. None draws, encodes or captures, and the host's accounts are empty."""
    script = (
        NVML
        + """
def ask(name, *words):
    try: return [(p.pid, p.usedGpuMemory >> 20) for p in getattr(N, name)(device, *words)]
    except N.NVMLError as error: return str(error)
for mode in range(3): say(ask("nvmlDeviceGetRunningProcessDetailList", N.nvmlProcessDetailList_v1, mode))
for mode, version in ((0, 7), (3, N.nvmlProcessDetailList_v1)):
    say(ask("nvmlDeviceGetRunningProcessDetailList", version, mode))
say(*(ask(f"nvmlDeviceGet{kind}RunningProcesses") for kind in ("Graphics", "MPSCompute")))
say(ask("nvmlDeviceGetEncoderSessions"), ask("nvmlDeviceGetFBCSessions"), N.nvmlDeviceGetAccountingBufferSize(device))
say(ask("nvmlDeviceGetAccountingPids"), ask("nvmlDeviceGetAccountingStats", 1))
"""
    )
    assert machine.python(script) == [
        f"[({holder.pid}, 618)]",
        "[]",
        "[]",
        "Argument version mismatch",
        "Invalid Argument",
        "[] []",
        "[] [] 4000",
        "[] Not Found",
    ]


def test_both_lists_of_busy_processes_agree(machine: Machine, holder: Popen[str]) -> None:
    script = (
        NVML
        + """
def busy(name):
    try: return [(p.pid, p.smUtil, p.timeStamp > 1 << 50) for p in getattr(N, name)(device, 0)]
    except N.NVMLError as error: return str(error)
names = "nvmlDeviceGetProcessUtilization", "nvmlDeviceGetProcessesUtilizationInfo"
start()
say(*map(busy, names))
launch(kernel('spin_5000000us')[1])
time.sleep(1.3)  # what is shown is of the last second
say(os.getpid(), *map(busy, names))
os._exit(0)
"""
    )
    idle, seen = machine.python(script)
    assert idle == "Not Found Not Found"
    pid = seen.split()[0]
    assert seen == f"{pid} [({pid}, 100, True)] [({pid}, 100, True)]"


def test_each_process_is_shown_with_its_part_of_the_time(machine: Machine) -> None:
    spin = "start(); launch(kernel('spin_5000000us')[1]); say('ready'); wait(); os._exit(0)"
    both = [machine.spawn(spin) for _ in range(2)]
    for one in both:
        assert one.stdout
        assert one.stdout.readline() == "ready\n"
    script = (
        NVML
        + """
time.sleep(1.3)
ran = sorted(p.smUtil for p in N.nvmlDeviceGetProcessUtilization(device, 0))
say(*ran, N.nvmlDeviceGetUtilizationRates(device).gpu)
"""
    )
    (said,) = machine.python(script)
    for one in both:
        one.communicate("\n", timeout=20)
    low, high, device = map(int, said.split())
    assert 40 <= low <= high <= 50  # each change of turns costs both
    assert 85 <= device <= 96


def test_gpustat_runs_on_the_simulated_driver(machine: Machine, holder: Popen[str]) -> None:
    pytest.importorskip("gpustat")
    text = machine.run(sys.executable, "-m", "gpustat", "--no-color", "--show-pid").stdout
    assert re.search(rf"\[0\] NVIDIA H200 .* 626 / 143771 MB \|.*/{holder.pid}\(618M\)", text)


def test_nvitop_runs_on_the_simulated_driver(machine: Machine, holder: Popen[str]) -> None:
    pytest.importorskip("nvitop")
    text = machine.run(sys.executable, "-m", "nvitop", "--once", "--ascii").stdout
    assert "140.4GiB" in text
    assert re.search(rf"\b{holder.pid} +C? *root +618\.\dMiB", text), text


def test_cuda_bindings_run_on_the_simulated_driver(machine: Machine) -> None:
    pytest.importorskip("cuda.bindings")
    script = """
from cuda.bindings import driver as D
def ok(answer):
    assert answer[0] == D.CUresult.CUDA_SUCCESS, answer
    return answer[1] if len(answer) == 2 else answer[1:]
ok(D.cuInit(0))
device = ok(D.cuDeviceGet(0))
context = ok(D.cuCtxCreate(None, 0, device))
free, total = ok(D.cuMemGetInfo())
pointer = ok(D.cuMemAlloc(100 << 20))
ok(D.cuMemsetD8(pointer, 7, 1009))
out = bytearray(1009)
ok(D.cuMemcpyDtoH(out, pointer, 1009))
say(total, free - ok(D.cuMemGetInfo())[0], set(out), int(D.cuMemFree(pointer)[0]), int(D.cuMemFree(pointer)[0]))
prop = D.CUmemAllocationProp()
prop.type = D.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
prop.location.type = D.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
handle = ok(D.cuMemCreate(4 << 20, prop, 0))
say(free - ok(D.cuMemGetInfo())[0])
ok(D.cuMemRelease(handle))
say(free - ok(D.cuMemGetInfo())[0], ok(D.cuGetErrorString(D.CUresult(2))))
"""
    assert machine.python(script) == [
        "150109880320 104857600 {7} 0 1",
        str(4 * MIB),
        "0 b'out of memory'",
    ]


def test_numba_runs_on_the_simulated_driver(machine: Machine) -> None:
    pytest.importorskip("numba_cuda")
    script = """
import numpy, _numba_cuda_redirector
from numba import cuda
before = cuda.current_context().get_memory_info()
array = cuda.to_device(numpy.arange(1 << 20, dtype=numpy.float64))
after = cuda.current_context().get_memory_info()
say(before.total, before.free - after.free, array.copy_to_host().sum() == (1 << 20) * ((1 << 20) - 1) / 2)
"""
    assert machine.python(script) == ["150109880320 8388608 True"]
