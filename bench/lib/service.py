"""Start and stop of the agent for a benchmark, and helpers that all benchmarks use."""

from __future__ import annotations

import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
FGPU = shlex.split(os.environ.get("FGPU", "fgpu"))
READY_SECONDS = 30


class BenchError(Exception):
    """A measurement was not possible. The text has the reason."""


@contextmanager
def agent(options: list[str]) -> Iterator[float]:
    """Run `fgpu agent` for the block, and yield the seconds from its start until it enforces limits.

    The agent is also stopped if this process gets SIGTERM. Raises BenchError if it does not start.
    """
    end_in_order()
    with tempfile.TemporaryFile("w+") as log:
        begun = time.monotonic()
        process = subprocess.Popen([*FGPU, "agent", *options], stdout=log, stderr=log)
        try:
            yield _await_enforcing(process, log, begun)
        finally:
            subprocess.run([*FGPU, "detach"], check=False, capture_output=True, timeout=30)
            process.terminate()
            process.wait(10)


def end_in_order() -> None:
    """Make SIGTERM raise SystemExit from now on, so that `finally` blocks run."""
    signal.signal(signal.SIGTERM, _leave)


def _leave(*_: object) -> None:
    """Raise SystemExit once. timeout(1) sends the signal twice, and the second would interrupt the cleanup."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def _await_enforcing(process: subprocess.Popen[bytes], log: IO[str], begun: float) -> float:
    while time.monotonic() < begun + READY_SECONDS:
        log.seek(0)
        text = log.read()
        if "enforcing" in text:
            return time.monotonic() - begun
        if process.poll() is not None:
            raise BenchError(f"the agent did not start: {text.strip()}")
        time.sleep(0.01)
    raise BenchError(f"the agent does not enforce limits within {READY_SECONDS} s")


def on_one_processor(command: Sequence[str]) -> list[str]:
    """Return the command bound to one processor, always the same one, because another may be half as fast."""
    return ["taskset", "--cpu-list", str(max(os.sched_getaffinity(0))), *command]


def percentile(values: list[float], percent: int) -> float:
    """Return the value below which `percent` of all values are. `percent`: 1 to 99."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
