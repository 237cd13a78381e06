"""The memory that the simulated driver holds, by its own figures."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.support.host import SIM


def driver_dump() -> dict[str, Any]:
    """Return everything that the simulated driver knows, as `fgpu-simd --dump` prints it."""
    done = subprocess.run([SIM / "fgpu-simd", "--dump"], capture_output=True, text=True, check=True, timeout=10)
    return dict(json.loads(done.stdout))


def driver_books() -> list[dict[str, Any]]:
    """Return what the driver itself holds: one entry for each process and device."""
    return list(driver_dump()["processes"])


def unnamed_bytes() -> int:
    """Return the bytes on all devices that no living process holds: those of exited ones, or of exports alone."""
    said = driver_dump()
    ended = sum(entry["bytes"] for entry in said["processes"] if entry["ended"])
    return ended + sum(device["exported_bytes"] for device in said["devices"])
