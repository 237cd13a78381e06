"""The check of the parker in `fgpu doctor`: a request for the state of the command's own process.

This module runs in the command, which has no device memory. The parker loads the driver for the answer,
and changes nothing.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from fgpu_ebpf.agent import parker_client
from fgpu_ebpf.check import Check
from fgpu_ebpf.linux import procfs

PATIENCE_SECONDS = 20.0  # a driver without persistence mode starts in seconds


def check(run_dir: Path) -> Check:
    """Check that a parker listens, has its capabilities and can use the driver."""
    pid = os.getpid()
    asked = {"op": parker_client.STATE, "processes": [{"pid": pid, "started": procfs.started(pid) or 0}]}
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        try:
            sock.connect(str(run_dir / parker_client.SOCKET))
        except PermissionError:
            return Check("parker", False, "this user may not send requests to the parker", "sudo fgpu doctor")
        except OSError as error:
            found = f"parking is on, and no parker listens ({error.strerror or error}): parked tenants do not wake up"
            return Check("parker", False, found, parker_client.fix())
        try:
            sock.sendall(json.dumps(asked).encode() + b"\n")
            answer: Any = json.loads(sock.makefile("rb").readline(parker_client.MOST_LINE_BYTES) or b"{}")
        except (OSError, ValueError) as error:
            return Check("parker", False, f"the parker does not answer: {error}", "read `journalctl -u fgpu-parker`")
    return _judged(answer if isinstance(answer, dict) else {})


def _judged(answer: dict[str, Any]) -> Check:
    if lacks := answer.get("lacks"):
        fix = "give the parker the capabilities that docs/rights.md lists, and restart the parker"
        return Check("parker", False, f"the parker lacks {', '.join(map(str, lacks))}", fix)
    if answer.get("error") or "states" not in answer:
        fix = "read `journalctl -u fgpu-parker`; or set `parking: off` in agent.yaml"
        return Check("parker", False, str(answer.get("error") or "the parker has ended without an answer"), fix)
    return Check("parker", True, "the parker can use the driver")
