"""A concurrent device for benchmarks: an agent, the command `fgpu mps`, and programs that use the device."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.lib.service import FGPU, ROOT, BenchError, agent
from bench.lib.tenants import Program

CONFIG = "devices:\n- match: ['*']\n  sharing: concurrent\n"
FOLDER = Path("/run/fgpu/shim/mps")
START_SECONDS = 30.0
LISTEN = "127.0.0.1:19425"
LIMIT = 2 << 30


@contextlib.contextmanager
def mps() -> Iterator[None]:
    """Run `fgpu mps` for the block. Raises BenchError if it does not start."""
    service = subprocess.Popen([*FGPU, "mps"])
    try:
        until = time.monotonic() + START_SECONDS
        while not (FOLDER / "control").exists():
            if service.poll() is not None or time.monotonic() > until:
                raise BenchError("fgpu mps does not start")
            time.sleep(0.05)
        yield
    finally:
        service.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            service.wait(10)
        service.kill()
        service.wait(10)


@contextlib.contextmanager
def concurrent(driver_root: str, shim: Path, policy: str = "") -> Iterator[None]:
    """Run an agent with concurrent devices and this policy, and MPS, for the block."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "agent.yaml").write_text(CONFIG)
        Path(folder, "policy.d").mkdir()
        if policy:
            Path(folder, "policy.d", "policy.yaml").write_text(policy)
        options = ["--driver-root", driver_root, "--shim", str(shim), "--listen", LISTEN]
        options += ["--policies", f"{folder}/policy.d", "--config", f"{folder}/agent.yaml"]
        with agent(options), mps():
            yield


def client(stack: contextlib.ExitStack, name: str) -> Program:
    """Start the program `writes` as a tenant with a share of time."""
    program = Program([str(ROOT / "build/bench/writes")], LIMIT, name, ["--weight", "100"])
    stack.callback(program.end)
    return program


def is_well(program: Program) -> bool:
    """Return whether a program still launches kernels."""
    program.say("count")
    try:
        return program.hear(10).isdigit()
    except BenchError:
        return False
