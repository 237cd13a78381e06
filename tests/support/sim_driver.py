"""The memory that the simulated driver holds, by its own figures."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.support.host import SIM


def driver_dump() -> dict[str, Any]:
    """Return the whole state of the simulated driver, as `fgpu-simd --dump` prints it."""
    done = subprocess.run([SIM / "fgpu-simd", "--dump"], capture_output=True, text=True, check=True, timeout=30)
    return dict(json.loads(done.stdout))


def driver_books() -> list[dict[str, Any]]:
    """Return the driver's own figures: one entry for each process and device."""
    return list(driver_dump()["processes"])


def unnamed_bytes() -> int:
    """Return the bytes on all devices that no living process holds: those of exited processes, or of exports only."""
    said = driver_dump()
    ended = sum(entry["bytes"] for entry in said["processes"] if entry["ended"])
    return ended + sum(device["exported_bytes"] for device in said["devices"])
