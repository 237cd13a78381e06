"""The claim `views`: third-party programs show a limited tenant's device on the real driver."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from xml.etree import ElementTree

from bench.gpu.claims import GRANULE, PYTHON, need, say
from bench.lib import nvml
from tests.support.host import GIB, MIB
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

LIMIT = 8 * GIB
TORCH = "import torch; p = torch.cuda.get_device_properties(0); print(p.total_memory, torch.cuda.mem_get_info()[1])"


def _fields(text: str) -> dict[str, str]:
    """Parse lines of the form `key : value`."""
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines()) if v}


def _smi(one: Tenant, used: int, pid: int) -> None:
    total = LIMIT // MIB
    table = one.run("nvidia-smi")
    print(table)
    need(re.findall(r"(\d+)MiB / +(\d+)MiB", table) == [(str(used), str(total))], "nvidia-smi: used / limit")
    full = one.run("nvidia-smi -q -d MEMORY,PIDS")
    memory = _fields(full.partition("BAR1")[0])
    print(full)
    need((memory["Total"], memory["Used"]) == (f"{total} MiB", f"{used} MiB"), "nvidia-smi -q: total and used")
    need(re.findall(r"Process ID +: (\d+)", full) == [str(pid)], "nvidia-smi -q: own processes")
    gpu = ElementTree.fromstring(one.run("nvidia-smi -x -q")).find("gpu")
    assert gpu is not None
    shown = {part.tag: part.text for part in gpu.findall("fb_memory_usage/*")}
    need((shown["total"], shown["used"]) == (f"{total} MiB", f"{used} MiB"), "nvidia-smi -x: total and used")
    need([p.text for p in gpu.findall("processes/process_info/pid")] == [str(pid)], "nvidia-smi -x: own processes")
    ask = "nvidia-smi --query-gpu=memory.total,memory.used,memory.free,memory.reserved --format=csv,noheader,nounits"
    row = [int(n) for n in one.run(ask).split(",")]
    need(row[:2] == [total, used] and sum(row[1:]) == total, f"nvidia-smi --query-gpu adds up: {row}")
    ask = "nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader,nounits"
    need(one.run(ask).split() == [f"{pid},", str(used)], "nvidia-smi --query-compute-apps")
    monitor = [line.split() for line in one.run("nvidia-smi pmon -c 1 -s m").splitlines() if line[0] != "#"]
    need([line[1] for line in monitor] == [str(pid)], f"nvidia-smi pmon: own processes: {monitor}")


def _python(one: Tenant, used: int, pid: int) -> None:
    if shutil.which("nvitop"):
        text = one.run("nvitop -1 --ascii")
        print(text)
        need(f"{used}MiB / {LIMIT // MIB}MiB" in text, "nvitop: used / limit")
        need(re.findall(r"^\| +0 +(\d+) +C ", text, re.MULTILINE) == [str(pid)], "nvitop: own processes")
    else:
        say("nvitop", "absent")
    if shutil.which("gpustat"):
        (found,) = json.loads(one.run("gpustat --json"))["gpus"]
        need((found["memory.used"], found["memory.total"]) == (used, LIMIT // MIB), "gpustat: used / limit")
        need([p["pid"] for p in found["processes"]] == [pid], "gpustat: own processes")
    else:
        say("gpustat", "absent")
    if subprocess.run([PYTHON, "-c", "import torch"], capture_output=True, timeout=120, check=False).returncode:
        say("torch", "absent")
        return
    (one.folder / "shown.py").write_text(TORCH)
    said = one.run(f"{PYTHON} shown.py", 120).split()
    need(said == [str(LIMIT)] * 2, f"torch: properties and mem_get_info show the limit: {said}")


def views(service: Service, place: Place) -> None:
    """Check that each program shows the tenant's limit, use and processes, and nothing of a neighbour."""
    one, other = place.tenant(LIMIT), place.tenant(4 * GIB)
    client, neighbour = one.client(), other.client()
    neighbour.ok(f"alloc {300 * MIB}")
    client.ok(f"alloc {GIB}")
    eventually(lambda: abs(one.memory()["used_bytes"] - nvml.bytes_of({client.pid})) < GRANULE, 5, "the context's size")
    used = one.memory()["used_bytes"] // MIB
    time.sleep(0.5)  # rows of processes are updated five times a second
    need(client.ok("info")[1] == LIMIT, "cuMemGetInfo shows the limit")
    _smi(one, used, client.inner_pid)
    _python(one, used, client.inner_pid)
