"""What programs that nobody here wrote see of it, and what a pid namespace sees of the others."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from xml.etree import ElementTree

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


def full(machine: Machine, *words: str) -> list[str]:
    return machine.run(machine.tools / "nvidia-smi", "-q", *words).stdout.splitlines()


def test_nvidia_smi_in_full(machine: Machine, holder: Popen[str]) -> None:
    """Label, colon and value where the real tool has them."""
    lines = full(machine)
    assert lines[:2] == ["", "==============NVSMI LOG=============="]
    start = lines.index("    FB Memory Usage")
    assert lines[start + 1 : start + 13] == [
        "        Total                             : 143771 MiB",
        "        Reserved                          : 616 MiB",
        "        Used                              : 627 MiB",
        "        Free                              : 142530 MiB",
        "    BAR1 Memory Usage",
        "        Total                             : 262144 MiB",
        "        Used                              : 1 MiB",
        "        Free                              : 262143 MiB",
        "    Conf Compute Protected Memory Usage",
        "        Total                             : 0 MiB",
        "        Used                              : 0 MiB",
        "        Free                              : 0 MiB",
    ]
    assert lines[lines.index("    Processes") :] == [
        "    Processes",
        "        GPU instance ID                   : N/A",
        "        Compute instance ID               : N/A",
        f"        Process ID                        : {holder.pid}",
        "            Type                          : C",
        f"            Name                          : {sys.executable}",
        "            Used GPU Memory               : 618 MiB",
        "",
    ]
    for line in (
        "Attached GPUs                             : 1",
        "GPU 00000000:00:06.0",
        "    Product Architecture                  : Hopper",
        "    Persistence Mode                      : Enabled",
        "    Display Active                        : Disabled",
        "    Fan Speed                             : N/A",
        "        Bus Id                            : 00000000:00:06.0",
    ):
        assert line in lines


def test_nvidia_smi_parts_of_it(machine: Machine) -> None:
    lines = full(machine, "-d", "MEMORY,PIDS")
    assert [line for line in lines if re.match("    [A-Z]", line)] == [
        "    FB Memory Usage",
        "    BAR1 Memory Usage",
        "    Conf Compute Protected Memory Usage",
        "    Processes                             : None",
    ]
    assert machine.run(machine.tools / "nvidia-smi", "-q", "-d", "BOGUS", check=False).returncode == 255


def test_nvidia_smi_xml(machine: Machine) -> None:
    """The same numbers; names that a process chose for itself cannot break it."""
    name = "a<b>&'\"c\x1b"
    script = "start(); alloc(100 << 20); say('up'); wait()"
    with machine.spawn(
        script, prefix=["env", f"PYTHONHOME={sys.base_prefix}", "bash", "-c", 'exec -a "$0" "$@"', name]
    ) as client:
        assert client.stdout is not None
        client.stdout.readline()
        text = machine.run(machine.tools / "nvidia-smi", "-x", "-q").stdout
        assert text.startswith('<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n')
        log = ElementTree.fromstring(text)
        assert log.findtext("attached_gpus") == "1"
        gpu = log.find("gpu")
        assert gpu is not None
        assert gpu.get("id") == "00000000:00:06.0"
        memory = {part.tag: part.text for part in gpu.findall("fb_memory_usage/*")}
        assert memory == {"total": "143771 MiB", "reserved": "616 MiB", "used": "627 MiB", "free": "142530 MiB"}
        process = {part.tag: part.text for part in gpu.findall("processes/process_info/*")}
        assert process == {
            "gpu_instance_id": "N/A",
            "compute_instance_id": "N/A",
            "pid": str(client.pid),
            "type": "C",
            "process_name": name.replace("\x1b", "?"),
            "used_memory": "618 MiB",
        }
        assert [gpu.findtext(path) for path in ("uuid", "mig_mode/current_mig", "ecc_mode/current_ecc")] == [
            machine.dump()["devices"][0]["uuid"],
            "Disabled",
            "Enabled",
        ]
        client.kill()


def test_nvidia_smi_pmon(machine: Machine) -> None:
    smi = machine.tools / "nvidia-smi"
    heading = [
        "# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command ",
        "# Idx           #    C/G      %      %      %      %      %      %    name ",
    ]
    name = Path(sys.executable).name
    idle = "    0          -     -      -      -      -      -      -      -    -              "
    assert machine.run(smi, "pmon", "-c", "1").stdout.splitlines() == [*heading, idle]
    with machine.spawn("start(); say('up'); wait(); launch(kernel('spin_2000000us')[1]); say('up'); wait()") as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdout.readline()
        assert machine.run(smi, "pmon", "-c", "1").stdout.splitlines() == [
            *heading,
            f"    0 {client.pid:>10}     C      -      -      -      -      -      -    {name:<15.15}",
        ]
        client.stdin.write("\n")
        client.stdin.flush()
        client.stdout.readline()
        assert machine.run(smi, "pmon", "-c", "1").stdout.splitlines()[2].split()[3:5] == ["100", "0"]
        client.kill()


def test_nvidia_smi_chooses_devices(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(FGPU_SIM_GPUS="3")
    smi = machine.tools / "nvidia-smi"
    uuid = machine.dump()["devices"][1]["uuid"]
    for words in (["-i", "1"], ["--id=1"], ["-i", str(uuid)], ["-i", "00000000:00:07.0"]):
        text = machine.run(smi, *words, "--query-gpu=index,count,uuid", "--format=csv,noheader").stdout
        assert text == f"1, 3, {uuid}\n"
    assert machine.run(smi, "-i", "2,0", "-L").stdout.count("GPU ") == 2
    missing = machine.run(smi, "-i", "7", check=False)
    assert (missing.returncode, missing.stdout) == (6, "No devices were found\n")


def test_nvidia_smi_more_fields(machine: Machine) -> None:
    smi = machine.tools / "nvidia-smi"
    fields = {
        "pstate": "P0",
        "power.draw [W]": "83.00 W",
        "power.limit [W]": "700.00 W",
        "power.min_limit [W]": "200.00 W",
        "clocks.current.sm [MHz]": "1980 MHz",
        "clocks.max.memory [MHz]": "3201 MHz",
        "fan.speed [%]": "[N/A]",
        "temperature.memory": "[N/A]",
        "compute_cap": "9.0",
        "compute_mode": "Default",
        "persistence_mode": "Enabled",
        "mig.mode.current": "Disabled",
        "ecc.errors.uncorrected.volatile.total": "0",
        "serial": "1653924184814",
        "pcie.link.width.max": "16",
        "utilization.memory [%]": "0 %",
    }
    names = ",".join(field.split(" ")[0] for field in fields)
    head, row = machine.run(smi, f"--query-gpu={names}", "--format=csv").stdout.splitlines()
    assert dict(zip(head.split(", "), row.split(", "), strict=True)) == fields
    short = machine.run(smi, "--query-gpu=timestamp,clocks.gr", "--format=csv,noheader,nounits").stdout
    assert re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{3}, 1980\n", short)


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
