"""The recipe of Ray, by a real Ray with the simulated driver: each worker has the limit that the page promises."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import output
from tests.support.containers import engines
from tests.support.host import BUILD, CONTEXT, FGPU, GIB, MIB, ROOT, SIM
from tests.support.service import Service
from tests.support.wait import eventually

pytestmark = pytest.mark.skipif(
    os.environ.get("FGPU_TEST_SCALE") != "full", reason="downloads Ray, 80 MB, of which each start takes seconds"
)
RAY = "ray==2.60.0"
PAGE = (ROOT / "docs/recipes.md").read_text()
FILES = dict(re.findall(r'^ *```\w+ title="(.+?)"\n(.*?)^ *```', PAGE, re.MULTILINE | re.DOTALL))
STEP = 64 * MIB
OOM = 2
# What a worker does: it reads how much memory the device has, and allocates until it is refused.
WORKER = f"""
import ctypes, sys, ray

class Worker:
    def fill(self):
        cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
        assert cuda.cuInit(0) == cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert cuda.cuCtxSetCurrent(context) == 0
        free, total, got, code = ctypes.c_size_t(), ctypes.c_size_t(), -1, 0
        assert cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
        while code == 0:
            got, pointer = got + 1, ctypes.c_uint64()
            code = cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t({STEP}))
        return {{"total": total.value, "bytes": got * {STEP}, "code": code, "gpus": ray.get_gpu_ids()}}
"""
# A cluster of one node. Two actors have parts of the GPU at the same time, and hold their memory until stdin is closed.
# After them a task and an actor without a GPU run.
CLUSTER = """
import json, os, sys
import fgpu_ray, worker, ray

ray.init(num_gpus=1, num_cpus=4, include_dashboard=False, _temp_dir=sys.argv[1], object_store_memory=80 << 20)
actors = [ray.remote(**fgpu_ray.share(part))(worker.Worker).remote() for part in (0.25, 0.5)]
print(json.dumps(ray.get([actor.fill.remote() for actor in actors])), flush=True)
sys.stdin.read()
for actor in actors:
    ray.kill(actor)

@ray.remote(max_retries=0, **fgpu_ray.share(1))
def whole():
    return worker.Worker().fill()

@ray.remote
def cgroup():
    return open("/proc/self/cgroup").read()

print(json.dumps(ray.get(whole.remote())), flush=True)
print(json.dumps([ray.get(cgroup.remote()), open("/proc/self/cgroup").read()]), flush=True)
"""
# What runs in a container: a node with one GPU by Ray's count, as in the page's command, and a task with this GPU.
NODE = """
import json, ray, worker
ray.init(address="auto", log_to_driver=False)
print("filled", json.dumps(ray.get(ray.remote(num_gpus=1)(worker.Worker).remote().fill.remote())), flush=True)
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """Return the interpreter of an environment with Ray. One process makes the environment, and others wait for it."""
    place = BUILD / RAY.replace("==", "-")
    with open(BUILD / "ray.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "done").exists():
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", place], check=True, timeout=60)
            command = [place / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", RAY]
            subprocess.run(command, check=True, timeout=200)
            (place / "done").touch()
    return place / "bin/python"


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Yield a folder with a short path, because Ray makes sockets far below it."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield Path(folder)


def limits() -> list[int]:
    """Return the limits that hold in the kernel, of all tenants."""
    tenants: list[dict[str, Any]] = output("status")["tenants"]
    return sorted(one["devices"][0]["limit_bytes"] for one in tenants if one["enforcement"] == "kernel")


def usable() -> int:
    return int(output("status")["devices"][0]["usable_bytes"])


def is_part(found: dict[str, Any], part: float) -> bool:
    """Return whether a worker saw this part of the device as the whole, and got all of it besides its context."""
    most = usable() * part
    is_shown = most - 2 * MIB < found["total"] <= most
    is_filled = most - STEP - 2 * MIB < found["bytes"] + CONTEXT <= most
    return bool(is_shown and is_filled and found["code"] == OOM)


def test_a_recipe_of_ray_gives_each_worker_its_fraction(
    service: Service, python: Path, tmp_path: Path, temporary: Path
) -> None:
    (tmp_path / "fgpu_ray.py").write_text(textwrap.dedent(FILES["fgpu_ray.py"]))
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "cluster.py").write_text(CLUSTER)
    (tmp_path / "fgpu").write_text(f'#!/bin/sh\nexec {" ".join(FGPU)} "$@"\n')
    (tmp_path / "fgpu").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin", "LD_LIBRARY_PATH": f"{SIM}/lib", "HOME": str(tmp_path),
        "PYTHONPATH": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    command = [python, tmp_path / "cluster.py", temporary]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    with open(tmp_path / "log", "w") as log:
        cluster = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stderr=log, **pipes)
    assert cluster.stdin
    assert cluster.stdout
    try:
        said = cluster.stdout.readline()
        assert said, (tmp_path / "log").read_text()[-5000:]
        assert [limit / usable() for limit in limits()] == pytest.approx([0.25, 0.5], abs=0.001)
        quarter, half = json.loads(said)
        assert is_part(quarter, 0.25), quarter
        assert is_part(half, 0.5), half
        assert quarter["gpus"] == half["gpus"] == [0]
        rest, _ = cluster.communicate(timeout=120)
        whole, cgroups = map(json.loads, rest.splitlines())
        assert is_part(whole, 1), whole
        assert cgroups[0] == cgroups[1], "a worker without a GPU stays in the cgroup of its node"
        assert cluster.returncode == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(cluster.pid, signal.SIGKILL)  # Ray's daemons too
        cluster.wait(10)
    eventually(lambda: not limits(), 20, "the end of the workers' tenants")


@pytest.mark.parametrize(("share", "part"), [("8gib", 8 * GIB), ("50pct-50pct", 0)])
def test_a_recipe_of_ray_limits_a_node_in_a_container(
    docker: engines.Engine, python: Path, tmp_path: Path, share: str, part: int
) -> None:
    """The image has the host's programs, and Ray. The options of the page that need a network are left out."""
    (line,) = re.findall(rf"^ +docker run (.*? --device fgpu.dev/share={share}) \S+ray\S+ (ray start .*)$", PAGE, re.M)
    devices, start = line
    options = devices.replace("--device nvidia.com/gpu=all", "").split()
    start = start.replace("--address=HEAD:6379", "--head").replace(" --block", "")
    assert "--head" in start
    assert options[0] == "--device"
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "node.py").write_text(NODE)
    host = [f"--volume={place}:{place}:ro" for place in ("/usr", "/lib", "/lib64", "/bin", "/sbin", str(BUILD))]
    more = [f"--env=PYTHONPATH={tmp_path}", "--env=RAY_USAGE_STATS_ENABLED=0", f"--volume={tmp_path}:{tmp_path}:ro"]
    sizes = f"--object-store-memory={80 << 20} --num-cpus=2 --include-dashboard=false"
    gpus = "" if "--num-gpus" in start else " --num-gpus=1"  # without NVIDIA's devices Ray counts none
    command = f"{python.parent}/{start}{gpus} {sizes} && {python} {tmp_path}/node.py; echo worker ended; sleep 600"
    try:
        done = docker.run("ray", *options, *host, *more, command=command)
        assert done.returncode == 0, done.stderr

        limit = part or usable() // (4 * MIB) * 2 * MIB  # half, in the driver's blocks of 2 MiB
        eventually(lambda: limits() == [limit], 10, f"the limit of the container, not {limits()}")

        def said() -> str:
            logs = docker.call("logs", "ray")
            return logs.stdout + logs.stderr

        eventually(lambda: "worker ended" in said(), 90, "the program of the container")
        text = said()
        assert "filled {" in text, text[-5000:]
        found = json.loads(text.split("filled ")[1].splitlines()[0])
        assert is_part(found, limit / usable()), found
    finally:
        docker.remove("ray")
