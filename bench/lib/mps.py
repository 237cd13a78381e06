"""The host's MPS for benchmarks: the command `fgpu mps`, after the start of an agent."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.lib.service import FGPU, BenchError

CONFIG = "devices:\n- match: ['*']\n  sharing: concurrent\n"
FOLDER = Path("/run/fgpu/shim/mps")
START_SECONDS = 30.0


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
