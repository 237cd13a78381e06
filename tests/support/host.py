"""Paths and constants of the host and the build under test; cgroups, ports and disks.

GPUS and ENVIRONMENT may be changed by a suite: read them as `host.GPUS` and `host.ENVIRONMENT`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shlex
import socket
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SIM = BUILD / "sim"
SHIM = BUILD / "shim/libfgpu.so"
DRIVER_ROOT = Path(os.environ.get("DRIVER_ROOT", SIM))
FGPU = shlex.split(os.environ.get("FGPU", str(ROOT / ".venv/bin/fgpu")))
RUN_DIR = Path("/run/fgpu")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CONTEXT = 518 * MIB  # the size of a context on the simulated device
# Kinds of memory, as in the driver's dump.
KINDS = ("context", "block", "vmm", "managed", "pool", "module", "graph", "local", "runtime", "launch")
GPUS = os.environ.get("FGPU_TEST_GPUS", "1")
PARALLEL = os.environ.get("FGPU_TEST_PARALLEL", "")  # FGPU_SIM_PARALLEL of the driver; "": contexts alternate
DRIVER_LIMITS = bool(os.environ.get("FGPU_TEST_DRIVER_LIMITS"))  # the driver has memory limits of cgroups
MEMORY = os.environ.get("FGPU_TEST_MEMORY", "16GiB")  # of each device
REFUSED = "CUDA_ERROR_OUT_OF_MEMORY"
ENVIRONMENT = {
    "PATH": f"{SIM}:{ROOT}/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LD_LIBRARY_PATH": str(SIM / "lib"),
    "HOME": "/root",
}
# Variables that the units and the chart set for agent and gatekeeper.
SERVICE_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.pthread.stack_cache_size=0"}


# Below the ports that the kernel assigns. Each worker of the tests has its own range.
_PORTS = itertools.cycle(
    range((first := 20000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw9")[2:])), first + 1000)
)


def free_port() -> int:
    """Return a TCP port at which no process listens, and which no other call returns soon."""
    for port in _PORTS:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


LISTEN = f"127.0.0.1:{free_port()}"
METRICS = f"http://{LISTEN}/metrics"


def cgroup_root() -> Path:
    """Return where cgroup v2 is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    raise AssertionError("no cgroup v2 here")


def fill(filler: Path) -> None:
    """Fill the file system of this file to the last byte.

    A file that another process was just replacing frees the bytes of the old one a moment later.
    """
    for pause in (0.2, 0.2, 0):
        with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        time.sleep(pause)


def new_seed() -> int:
    """Return a seed for random operations: a new one in a full run, and otherwise always the same."""
    return random.SystemRandom().randrange(1 << 30) if os.environ.get("FGPU_TEST_SCALE") == "full" else 1
