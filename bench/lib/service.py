"""Start and stop the agent for a benchmark; errors and figures that benchmarks share."""

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
    """The reason why nothing could be measured."""


@contextmanager
def agent(options: list[str]) -> Iterator[float]:
    """Run `fgpu agent` for a while, also with SIGTERM. Yield the seconds from its start to enforcing."""
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
    """Let SIGTERM raise an exception from now on."""
    signal.signal(signal.SIGTERM, _leave)


def _leave(*_: object) -> None:
    """Raise once: `timeout` sends the signal twice, and the second one would interrupt the cleaning up."""
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
    raise BenchError("the agent does not come up")


def on_one_processor(command: Sequence[str]) -> list[str]:
    """Return the command bound to one processor, always the same: another one may be half as fast."""
    return ["taskset", "--cpu-list", str(max(os.sched_getaffinity(0))), *command]


def percentile(values: list[float], percent: int) -> float:
    """Return the value that `percent` of all values are below."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
