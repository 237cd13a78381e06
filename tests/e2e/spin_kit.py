"""Tenants that keep a device busy."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tests.support.commands import ask
from tests.support.host import ENVIRONMENT, FGPU, GIB

KERNEL_US = 200
SECONDS = 3


class Spin:
    """A running spin, in a tenant of its own."""

    def __init__(
        self,
        program: Path,
        name: str,
        *limits: str,
        kernel_us: int = KERNEL_US,
        stderr: IO[bytes] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        command = [*FGPU, "run", "--memory", f"{GIB}B", "--name", name, *limits, "--"]
        command += [*before, program, str(kernel_us), "burst"]
        self.name = name
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=stderr, text=True, bufsize=1, env=ENVIRONMENT
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def begin(self, seconds: float = SECONDS) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{seconds}\n")

    def kernels(self) -> float:
        return self.said()[0]

    def said(self) -> list[float]:
        """Return the number of kernels done, and the p50 and p99 of a step in microseconds."""
        assert self.process.stdout
        return [float(word) for word in self.process.stdout.readline().split()]

    def compute(self) -> dict[str, float]:
        (tenant,) = [t for t in ask(verb="snapshot")["tenants"] if t["tenant"] == self.name]
        assert tenant["enforcement"] == "kernel"
        return dict(tenant["devices"][0]["compute"] or {})

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def together(*programs: Spin) -> list[int]:
    for program in programs:
        program.begin()
    return [program.kernels() for program in programs]
