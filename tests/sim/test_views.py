"""What programs that nobody here wrote see of it, and what a pid namespace sees of the others."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from subprocess import Popen

import pytest

from .conftest import CLIENT, MIB, Machine

pytest.importorskip("pynvml")

NVML = """
import pynvml as N
N.nvmlInit()
device = N.nvmlDeviceGetHandleByIndex(0)
def processes():
    return sorted((p.pid, p.usedGpuMemory >> 20) for p in N.nvmlDeviceGetComputeRunningProcesses(device))
"""


@pytest.fixture
def holder(machine: Machine) -> Iterator[Popen[str]]:
    with machine.spawn("start(); alloc(100 << 20); say('holding'); wait()") as client:
        assert client.stdout is not None
        client.stdout.readline()
        yield client
        client.kill()


def test_nvml_sees_host_pids(machine: Machine, holder: Popen[str]) -> None:
    assert machine.python(NVML + "say(processes())") == [f"[({holder.pid}, 618)]"]


def test_two_versions_of_the_memory_question(machine: Machine, holder: Popen[str]) -> None:
    """The old one counts the driver's reserve as used, the new one tells it apart."""
    script = (
        NVML
        + """
old, new = N.nvmlDeviceGetMemoryInfo(device), N.nvmlDeviceGetMemoryInfo(device, version=N.nvmlMemory_v2)
say(old.total - new.total, old.free - new.free, old.used - new.used, new.reserved, new.used >> 20)
"""
    )
    assert machine.python(script) == ["0 0 644939776 644939776 626"]


def test_a_context_that_is_gone_is_not_listed(machine: Machine) -> None:
    script = NVML + "start(); say(len(processes())); need('cuDevicePrimaryCtxReset_v2', 0); say(len(processes()))"
    assert machine.python(script) == ["1", "0"]


def in_pid_namespace(script: str, proc: bool = True) -> list[str]:
    flags = ["--mount-proc"] if proc else []
    return ["unshare", "--pid", "--fork", *flags, sys.executable, "-c", CLIENT + NVML + script]


def test_pid_namespace_sees_its_own(machine: Machine, holder: Popen[str]) -> None:
    """Inside: own processes, pids as known there. The host: all of them, with its own pids."""
    script = "start(); alloc(5 << 20); say(os.getpid(), processes()); say('up'); wait()"
    words = in_pid_namespace(script)
    with machine.spawn("", prefix=[*words, "--"]) as inside:
        assert inside.stdin is not None
        assert inside.stdout is not None
        assert inside.stdout.readline() == "1 [(1, 524)]\n"
        inside.stdout.readline()
        pids = [p["pid"] for p in machine.dump()["processes"]]
        assert holder.pid in pids
        assert len(pids) == 2
        listed = machine.python(NVML + "say(processes())")[0]
        assert re.findall(r"\((\d+),", listed) == [str(pid) for pid in sorted(pids)]
        inside.stdin.write("\n")
        inside.stdin.flush()


def test_sibling_namespaces_do_not_see_each_other(machine: Machine) -> None:
    script = "start(); say('up'); wait(); say(processes()); say('seen'); wait()"
    words = [*in_pid_namespace(script), "--"]
    with machine.spawn("", prefix=words) as one, machine.spawn("", prefix=words) as other:
        for client in (one, other):
            assert client.stdout is not None
            assert client.stdout.readline() == "up\n"
        for client in (one, other):
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write("\n")
            client.stdin.flush()
            assert client.stdout.readline() == "[(1, 518)]\n"
            client.stdout.readline()
        for client in (one, other):
            assert client.stdin is not None
            client.stdin.write("\n")
            client.stdin.flush()


def test_foreign_proc_lists_nobody(machine: Machine, holder: Popen[str]) -> None:
    done = machine.run(*in_pid_namespace("start(); say(processes())", proc=False))
    assert done.stdout == "[]\n"


def test_outer_namespace_sees_inner_but_not_reverse(machine: Machine) -> None:
    """Two levels: the middle one sees the innermost process under a pid of the middle."""
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


def test_process_list_sizes(machine: Machine, holder: Popen[str]) -> None:
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


def test_nvidia_smi_table(machine: Machine, holder: Popen[str]) -> None:
    """Column for column the real tool's: compared with lines that it printed."""
    lines = machine.run(machine.tools / "nvidia-smi").stdout.splitlines()
    assert "| NVIDIA-SMI 580.159.04             Driver Version: 580.159.04     CUDA Version: 13.0     |" in lines
    assert "|   0  NVIDIA H200                    On  |   00000000:00:06.0 Off |                    0 |" in lines
    assert "| N/A   33C    P0             83W /  700W |     627MiB / 143771MiB |      0%      Default |" in lines
    assert "|                                         |                        |             Disabled |" in lines
    process = [line for line in lines if " C   " in line]
    assert re.fullmatch(rf"\|    0   N/A  N/A {holder.pid:>15}      C   .{{36}}    618MiB \|", process[0])
    assert {len(line) for line in lines[1:] if line} == {91}


def test_nvidia_smi_idle(machine: Machine) -> None:
    text = machine.run(machine.tools / "nvidia-smi").stdout
    assert "|       0MiB / 143771MiB |" in text
    assert "|  No running processes found                                                             |" in text


def test_nvidia_smi_queries(machine: Machine, holder: Popen[str]) -> None:
    smi = machine.tools / "nvidia-smi"
    uuid = machine.dump()["devices"][0]["uuid"]
    assert machine.run(smi, "-L").stdout == f"GPU 0: NVIDIA H200 (UUID: {uuid})\n"
    fields = "index,name,uuid,memory.total,memory.used,memory.free,driver_version,pci.bus_id,utilization.gpu"
    assert machine.run(smi, f"--query-gpu={fields}", "--format=csv").stdout.splitlines() == [
        "index, name, uuid, memory.total [MiB], memory.used [MiB], memory.free [MiB], driver_version, pci.bus_id, "
        "utilization.gpu [%]",
        f"0, NVIDIA H200, {uuid}, 143771 MiB, 627 MiB, 142530 MiB, 580.159.04, 00000000:00:06.0, 0 %",
    ]
    bare = machine.run(smi, "--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits").stdout
    assert bare == "0, NVIDIA H200, 143771, 627\n"
    processes = machine.run(smi, "--query-compute-apps=pid,used_memory,process_name,gpu_uuid", "--format=csv").stdout
    assert processes.splitlines() == [
        "pid, used_gpu_memory [MiB], process_name, gpu_uuid",
        f"{holder.pid}, 618 MiB, {sys.executable}, {uuid}",
    ]
    wrong = machine.run(smi, "--query-gpu=bogus", "--format=csv", check=False)
    assert (wrong.returncode, wrong.stdout) == (2, 'Field "bogus" is not a valid field to query.\n\n')
    assert machine.run(smi, "--bogus", check=False).returncode == 255


def test_nvidia_smi_resolves_by_dlsym(machine: Machine) -> None:
    """A preloaded library that answers dlsym must be able to change every number that it prints."""
    needed = subprocess.run(["readelf", "-d", machine.tools / "nvidia-smi"], check=True, capture_output=True, text=True)
    symbols = subprocess.run(["nm", "-D", machine.tools / "nvidia-smi"], check=True, capture_output=True, text=True)
    assert "nvidia-ml" not in needed.stdout
    assert "nvml" not in symbols.stdout.replace("nvmlx", "")
    assert "U dlsym" in symbols.stdout


def test_gpustat(machine: Machine, holder: Popen[str]) -> None:
    pytest.importorskip("gpustat")
    text = machine.run(sys.executable, "-m", "gpustat", "--no-color", "--show-pid").stdout
    assert re.search(rf"\[0\] NVIDIA H200 .* 626 / 143771 MB \|.*/{holder.pid}\(618M\)", text)


def test_nvitop(machine: Machine, holder: Popen[str]) -> None:
    pytest.importorskip("nvitop")
    text = machine.run(sys.executable, "-m", "nvitop", "--once", "--ascii").stdout
    assert "140.4GiB" in text
    assert re.search(rf"\b{holder.pid} +C? *root +618\.\dMiB", text), text


def test_cuda_bindings(machine: Machine) -> None:
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


def test_numba(machine: Machine) -> None:
    pytest.importorskip("numba_cuda")
    script = """
import numpy
from numba import cuda
before = cuda.current_context().get_memory_info()
array = cuda.to_device(numpy.arange(1 << 20, dtype=numpy.float64))
after = cuda.current_context().get_memory_info()
say(before.total, before.free - after.free, array.copy_to_host().sum() == (1 << 20) * ((1 << 20) - 1) / 2)
"""
    assert machine.python(script) == ["150109880320 8388608 True"]
