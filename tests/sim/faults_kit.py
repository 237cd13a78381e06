"""Faults of the simulated driver."""

from __future__ import annotations

import subprocess

from .conftest import Machine


def order(machine: Machine, spec: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return machine.run(machine.tools / "fgpu-simd", "--fault", spec, check=check)
