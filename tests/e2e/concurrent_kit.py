"""A concurrent device. The simulated device runs kernels side by side or in turn, with MPS or without."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from tests.support.commands import metrics
from tests.support.host import RUN_DIR
from tests.support.service import Service

SETTING = "devices: [{match: ['*'], sharing: concurrent}]\n"


def shared() -> float:
    """Return the seconds for which all tenants of the device could launch at the same time."""
    return metrics().get(("fgpu_slice_lent_seconds_total", frozenset({("gpu", "0")})), 0.0)


def with_mps(service: Service) -> Iterator[Service]:
    """Restart the agent with a concurrent device, and put a socket where `fgpu mps` puts that of MPS."""
    said = service.config.read_text()
    service.config.write_text(said + SETTING)
    service.kill_agent()
    service.start_agent()
    folder = RUN_DIR / "shim/mps"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(folder / "control"))
        yield service
    (folder / "control").unlink()
    folder.rmdir()
    service.config.write_text(said)
    service.kill_agent()
    service.start_agent()
