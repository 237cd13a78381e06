"""Third-party clients' views of a device: a tenant's programs read its share, and only its own processes."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.commands import fgpu
from tests.support.host import BUILD, CONTEXT, ENVIRONMENT, GIB, MIB, SHIM
from tests.support.place import group
from tests.support.sim_driver import driver_books
from tests.support.tenant import Client, Program, Tenant
from tests.support.wait import eventually

PLACES = pytest.mark.places("host", "pidns", "runc")
LIMIT, HELD = 2 * GIB, CONTEXT + 100 * MIB

# Everything that nvidia-ml-py reports about memory and processes, as one JSON object.
NVML = """
import ctypes as C, json, pynvml as N
N.nvmlInit()
device = N.nvmlDeviceGetHandleByIndex(0)
def fields(answer): return {name: getattr(answer, name) for name, *_ in answer._fields_}
def rows(ask):
    try: return sorted((row.pid, row.usedGpuMemory) for row in ask())
    except N.NVMLError as error: return str(error)
def pids(ask):
    try: return sorted(row.pid for row in ask())
    except N.NVMLError as error: return str(error)
class Old(C.Structure): _fields_ = [("pid", C.c_uint), ("usedGpuMemory", C.c_ulonglong)]
def first(kind):
    count, lines = C.c_uint(8), (Old * 8)()
    N._nvmlCheckReturn(getattr(N.nvmlLib, f"nvmlDeviceGet{kind}RunningProcesses")(device, C.byref(count), lines))
    return lines[: count.value]
found = {"v1": fields(N.nvmlDeviceGetMemoryInfo(device)),
         "v2": fields(N.nvmlDeviceGetMemoryInfo(device, N.nvmlMemory_v2)),
         "bar1": fields(N.nvmlDeviceGetBAR1MemoryInfo(device))}
for kind in ("Compute", "Graphics", "MPSCompute"):
    found[kind] = [rows(lambda: first(kind))]
    for version in ("", "_v2", "_v3"):
        name = f"nvmlDeviceGet{kind}RunningProcesses{version}"
        found[kind] += [rows(lambda: getattr(N, name)(device))] if hasattr(N, name) else []
found["detail"] = [rows(lambda: N.nvmlDeviceGetRunningProcessDetailList(device, N.nvmlProcessDetailList_v1, mode))
                   for mode in range(3)]
found["busy"] = [pids(lambda: N.nvmlDeviceGetProcessUtilization(device, 0)),
                 pids(lambda: N.nvmlDeviceGetProcessesUtilizationInfo(device, 0))]
found["sessions"] = [pids(lambda: N.nvmlDeviceGetEncoderSessions(device)),
                     pids(lambda: N.nvmlDeviceGetFBCSessions(device))]
found["accounting"] = pids(lambda: N.nvmlDeviceGetAccountingPids(device))
print(json.dumps(found))
"""

# Keeps the device busy for a while: prints a line, and waits.
BUSY = """
import ctypes as C, sys
L = C.CDLL("libcuda.so.1")
def need(name, *words): result = getattr(L, name)(*words); result and sys.exit(f"{name}: {result}")
context, module, function = C.c_void_p(), C.c_void_p(), C.c_void_p()
need("cuInit", 0)
need("cuDevicePrimaryCtxRetain", C.byref(context), 0)
need("cuCtxSetCurrent", context)
need("cuModuleLoadData", C.byref(module), b"any")
need("cuModuleGetFunction", C.byref(function), module, b"spin_60000000us")
need("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, None, None, None)
print("busy", flush=True)
sys.stdin.readline()
"""


def on_the_host(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program outside every tenant."""
    return subprocess.run(words, capture_output=True, timeout=60, check=False, env={**ENVIRONMENT, **environment})


def nvml(tenant: Tenant) -> dict[str, Any]:
    """Return what nvidia-ml-py reports inside the tenant."""
    (tenant.folder / "views.py").write_text(NVML)
    return json.loads(tenant.run("python views.py"))


@contextlib.contextmanager
def stranger(*commands: str) -> Iterator[int]:
    """Start a CUDA program outside every tenant, which runs these commands. Yield its pid."""
    words = [BUILD / "e2e/client"]
    with subprocess.Popen(words, stdin=-1, stdout=-1, text=True, env=ENVIRONMENT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready ")
        for command in commands:
            process.stdin.write(f"{command}\n")
            process.stdin.flush()
            assert process.stdout.readline().startswith("ok")
        yield process.pid
        process.kill()


@dataclass(frozen=True, slots=True)
class Scene:
    """A tenant with one program, another tenant with another, and a program outside every tenant."""

    one: Tenant
    client: Client
    rows: list[list[int]]  # rows that the tenant may read: pid, bytes

    def shows(self, command: str) -> str:
        """Return the output of a command in the tenant."""
        return self.one.run(command)


@pytest.fixture
def scene(tenant: Callable[[int], Tenant]) -> Iterator[Scene]:
    one, other = tenant(LIMIT), tenant(GIB)
    client, neighbour = one.client(), other.client()
    with one.growing(100 * MIB):
        client.ok(f"alloc {100 * MIB}")
    with other.growing(50 * MIB):
        neighbour.ok(f"alloc {50 * MIB}")
    assert one.assert_exact() == HELD
    with stranger("context") as pid:
        seen = on_the_host("nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader").stdout.split()
        assert {int(p) for p in seen} == {client.pid, neighbour.pid, pid}, "the driver lists all three processes"
        rows = [[client.inner_pid, HELD]]
        eventually(lambda: nvml(one)["Compute"][-1] == rows, 3, "the tenant's own list")
        yield Scene(one, client, rows)


# -- nvidia-smi


@PLACES
def test_nvidia_smi_shows_the_share_and_own_processes_in_its_table(scene: Scene) -> None:
    table = scene.shows("nvidia-smi")
    assert re.findall(r"(\d+)MiB / +(\d+)MiB", table) == [("618", "2048")]
    processes = re.findall(r"^\| +0 +N/A +N/A +(\d+) +C .* (\d+)MiB \|$", table, re.MULTILINE)
    assert processes == [(str(scene.client.inner_pid), "618")]


@PLACES
def test_nvidia_smi_q_shows_the_share_and_own_processes(scene: Scene) -> None:
    lines = scene.shows("nvidia-smi -q").splitlines()
    at = lines.index("    FB Memory Usage")
    values = {key.strip(): value.strip() for key, value in (line.split(":") for line in lines[at + 1 : at + 5])}
    assert values == {"Total": "2048 MiB", "Reserved": "0 MiB", "Used": "618 MiB", "Free": "1430 MiB"}
    assert re.findall(r"Process ID +: (\d+)", "\n".join(lines)) == [str(scene.client.inner_pid)]
    assert re.findall(r"Used GPU Memory +: (.*)", "\n".join(lines)) == ["618 MiB"]
    host = on_the_host("nvidia-smi", "-q").stdout.decode().splitlines()
    assert lines[lines.index("    BAR1 Memory Usage") :][:4] == host[host.index("    BAR1 Memory Usage") :][:4]


@PLACES
def test_nvidia_smi_xml_shows_the_share_and_own_processes(scene: Scene) -> None:
    gpus = ElementTree.fromstring(scene.shows("nvidia-smi -x -q")).findall("gpu")
    assert [{part.tag: part.text for part in gpu.findall("fb_memory_usage/*")} for gpu in gpus] == [
        {"total": "2048 MiB", "reserved": "0 MiB", "used": "618 MiB", "free": "1430 MiB"}
    ]
    assert [
        (process.findtext("pid"), process.findtext("used_memory"), process.findtext("process_name"))
        for process in gpus[0].findall("processes/process_info")
    ] == [(str(scene.client.inner_pid), "618 MiB", f"{BUILD}/e2e/client")]


@PLACES
def test_nvidia_smi_queries_return_the_share_and_own_processes(scene: Scene) -> None:
    fields = "index,memory.total,memory.used,memory.free,memory.reserved"
    ask = f"nvidia-smi --query-gpu={fields} --format=csv"
    heading = "index, memory.total [MiB], memory.used [MiB], memory.free [MiB], memory.reserved [MiB]"
    assert scene.shows(ask).splitlines() == [heading, "0, 2048 MiB, 618 MiB, 1430 MiB, 0 MiB"]
    assert scene.shows(f"{ask},noheader") == "0, 2048 MiB, 618 MiB, 1430 MiB, 0 MiB\n"
    assert scene.shows(f"{ask},noheader,nounits") == "0, 2048, 618, 1430, 0\n"
    processes = scene.shows("nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv").splitlines()
    assert processes == [
        "pid, process_name, used_gpu_memory [MiB]",
        f"{scene.client.inner_pid}, {BUILD}/e2e/client, 618 MiB",
    ]
    assert scene.shows("nvidia-smi -L") == on_the_host("nvidia-smi", "-L").stdout.decode()


@PLACES
def test_nvidia_smi_pmon_shows_own_processes(scene: Scene) -> None:
    lines = scene.shows("nvidia-smi pmon -c 1 -s um").splitlines()
    assert [line.split() for line in lines if not line.startswith("#")] == [
        ["0", str(scene.client.inner_pid), "C", *"------", "618", "0", "client"]
    ]
    assert len(scene.shows("nvidia-smi pmon -c 1").splitlines()) == 3


# -- tools that use nvidia-ml-py


@PLACES
def test_every_nvml_call_returns_the_share_and_own_processes(scene: Scene) -> None:
    found = nvml(scene.one)
    assert found["v1"] == {"total": LIMIT, "free": LIMIT - HELD, "used": HELD}
    v2 = {name: found["v2"][name] for name in ("total", "reserved", "free", "used")}
    assert v2 == {"total": LIMIT, "reserved": 0, "free": LIMIT - HELD, "used": HELD}
    assert len(found["Compute"]) == 4
    assert all(rows == scene.rows for rows in found["Compute"]), found
    assert set(map(str, found["Graphics"] + found["MPSCompute"])) == {"[]"}
    assert found["detail"] == [scene.rows, [], []]
    assert found["sessions"] == [[], []]
    host = json.loads(on_the_host(sys.executable, "-c", NVML).stdout)
    assert found["bar1"] == host["bar1"]
    assert found["accounting"] == host["accounting"] == []
    assert len(host["Compute"][-1]) == len(host["detail"][0]) == 3


@PLACES
def test_nvml_returns_the_utilization_of_own_processes_only(tenant: Callable[[int], Tenant]) -> None:
    one, other, pids = tenant(LIMIT), tenant(LIMIT), []
    programs = []
    for name, where in (("busy", one), ("busy", other)):
        where.assert_enforced()
        (where.folder / "busy.py").write_text(BUSY)
        programs.append(Program(where, name, "python busy.py"))
        assert programs[-1].receive() == "busy"
    for where in (one, other):
        eventually(lambda: nvml(where)["Compute"][-1], 3, "the tenant's process in the list")  # noqa: B023
        (row,) = nvml(where)["Compute"][-1]
        eventually(lambda: nvml(where)["busy"] == [[row[0]], [row[0]]], 5, "the process is busy")  # noqa: B023
        pids.append(where.host_pid(row[0]))
        monitor = where.run("nvidia-smi pmon -c 1").splitlines()[2:]
        assert [line.split()[:3] for line in monitor] == [["0", str(row[0]), "C"]]
        assert 0 < int(monitor[0].split()[3]) <= 100
    assert None not in pids
    both = [sorted(pids)] * 2
    eventually(lambda: json.loads(on_the_host(sys.executable, "-c", NVML).stdout)["busy"] == both, 5, "both are busy")
    for program in programs:
        program.close()


@PLACES
def test_gpustat_shows_the_share_and_own_processes(scene: Scene) -> None:
    found = json.loads(scene.shows("gpustat --json"))["gpus"]
    assert [(gpu["memory.used"], gpu["memory.total"]) for gpu in found] == [(618, 2048)]
    assert [(p["pid"], p["gpu_memory_usage"]) for p in found[0]["processes"]] == [(scene.client.inner_pid, 618)]
    text = scene.shows("gpustat --no-color --show-pid")
    assert re.search(rf"\| +618 / +2048 MB \| \S+/{scene.client.inner_pid}\(618M\)\s*$", text), text


@PLACES
def test_nvitop_shows_the_share_and_own_processes(scene: Scene) -> None:
    text = scene.shows("nvitop -1 --ascii")
    assert re.search(r"\| +618\.0MiB / 2048MiB \|", text), text
    processes = re.findall(r"^\| +0 +(\d+) +C +\S+ +([\d.]+MiB) ", text, re.MULTILINE)
    assert processes == [(str(scene.client.inner_pid), "618.0MiB")], text


# -- the figures


def numbers(one: Tenant, client: Client) -> dict[str, list[int]]:
    """Return the figures that CUDA returns to a running program, and NVML to a new one."""
    free, total = client.ok("info")
    (device,) = client.ok("total")
    found = nvml(one)
    return {
        "cuda": [total, device, free],
        "v1": [found["v1"][name] for name in ("total", "free", "used")],
        "v2": [found["v2"][name] for name in ("total", "reserved", "free", "used")],
    }


def share(total: int, free: int, used: int) -> dict[str, list[int]]:
    """Return the expected figures. Bytes neither free nor used are reserved, so that the second version adds up."""
    return {"cuda": [total, total, free], "v1": [total, free, used], "v2": [total, total - free - used, free, used]}


@PLACES
def test_a_limit_below_the_use_leaves_no_free_memory(tenant: Callable[[int], Tenant]) -> None:
    one = tenant(LIMIT)
    client = one.client()
    with one.growing(100 * MIB):
        (pointer,) = client.ok(f"alloc {100 * MIB}")
    assert one.assert_exact() == HELD
    assert numbers(one, client) == share(LIMIT, LIMIT - HELD, HELD)
    fgpu("set", one.path, "--memory", f"{HELD - 1}B")
    assert numbers(one, client) == share(HELD - 1, 0, HELD - 1)
    client.ok(f"free {pointer}")
    assert numbers(one, client) == share(HELD - 1, HELD - 1 - CONTEXT, CONTEXT)


@PLACES
def test_no_view_shows_more_free_memory_than_the_driver_has(tenant: Callable[[int], Tenant]) -> None:
    """Memory of others on the device is neither free nor the tenant's."""
    one = tenant(12 * GIB)
    client = one.client()
    with one.growing(100 * MIB):
        client.ok(f"alloc {100 * MIB}")
    with stranger("context", *[f"alloc {GIB}"] * 8):
        one.assert_exact()
        host = json.loads(on_the_host(sys.executable, "-c", NVML).stdout)["v2"]
        assert host["free"] < 12 * GIB - HELD
        assert numbers(one, client) == share(12 * GIB, host["free"], HELD)


@PLACES
def test_the_views_show_the_narrowest_level(place: Any, tenant: Callable[[int], Tenant]) -> None:
    one, other = tenant(LIMIT), tenant(LIMIT)
    client, neighbour = one.client(), other.client()
    with one.growing(100 * MIB):
        client.ok(f"alloc {100 * MIB}")
    with other.growing(700 * MIB):
        neighbour.ok(f"alloc {700 * MIB}")
    assert one.assert_exact() == HELD
    theirs = other.assert_exact()
    for limit in (3 * GIB, 1900 * MIB, HELD + theirs - MIB):  # above its own use, below it, below the bytes in use
        with group(place, limit) as look:
            eventually(lambda: look()["used_bytes"] == HELD + theirs, 3, "the group's use")
            total = min(LIMIT, limit)
            free = max(0, min(LIMIT - HELD, limit - HELD - theirs))
            # A running program gets the page of a new level with its next hello. It sends at most one hello a second.
            shown = share(total, free, HELD)
            eventually(lambda: numbers(one, client) == shown, 10, f"{shown}")  # noqa: B023


# -- processes without a limit

TIMES = rb"\d+:\d\d:\d\d(\.\d+)?|(\"query_time\": \").*(\")|^\w{3} \w{3} +\d+ .*|Up [^|]*"
PROGRAMS = [
    ["nvidia-smi"], ["nvidia-smi", "-L"], ["nvidia-smi", "-q"], ["nvidia-smi", "-x", "-q"],
    ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,memory.free", "--format=csv"],
    ["nvidia-smi", "--query-compute-apps=pid,name,used_memory", "--format=csv,noheader,nounits"],
    ["nvidia-smi", "pmon", "-c", "1", "-s", "um"], ["nvidia-smi", "-i", "7"], ["nvidia-smi", "--nonsense"],
    ["gpustat", "--no-color", "--show-pid"], ["gpustat", "--json"],
    ["python", "-c", NVML],
    ["python", "-c", "import os, sys; print('a', flush=True); os.write(2, b'b'); sys.exit(3)"],
    ["python", "-c", "import sys; sys.stdout.buffer.write(bytes(range(256)) * 4096)"],
    ["sh", "-c", "printf 'context\\nalloc 1048576\\ninfo\\ntotal\\nnonsense\\n' | client | sed -e 1d -e 3d"],
    ["sh", "-c", "ls -l /proc/self/fd | wc -l; umask; kill -9 $$"], ["false"],
]  # fmt: skip


def alone(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program on the host once the driver holds only the memory of the program outside every tenant."""
    eventually(lambda: len(driver_books()) == 1, 5, "no memory except that of the program outside every tenant")
    return on_the_host(*words, **environment)


def test_the_shim_changes_no_output_without_a_limit(unharmed: None) -> None:
    """Programs outside every tenant have the same output, errors and exit codes with and without the shim."""
    path = {"PATH": f"{BUILD}/e2e:{ENVIRONMENT['PATH']}"}
    with stranger("context", f"alloc {50 * MIB}"):
        for words in PROGRAMS:
            bare, with_shim = (alone(*words, **path, **more) for more in ({}, {"LD_PRELOAD": str(SHIM)}))
            outputs = [re.sub(TIMES, b"", done.stdout, flags=re.MULTILINE) for done in (bare, with_shim)]
            assert outputs[0] == outputs[1], words
            assert (bare.returncode, bare.stderr) == (with_shim.returncode, with_shim.stderr), words
            assert bare.stdout or words == ["false"], words
    maps = on_the_host("sh", "-c", "cat /proc/self/maps", LD_PRELOAD=str(SHIM)).stdout
    assert str(SHIM).encode() in maps, "the shim was not loaded: nothing was tested"
