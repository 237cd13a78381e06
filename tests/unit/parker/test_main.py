"""The parker's loop."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from fgpu_ebpf.parker.main import Parker, Running, listen


def no_driver() -> Any:
    raise AssertionError("no job opens the driver")


def test_an_event_of_a_connection_that_its_job_has_closed_is_ignored(tmp_path: Path) -> None:
    """The selector may report the end of a job and the client's reaction to the result together."""
    listener = listen(tmp_path)
    parker = Parker(listener, tmp_path, no_driver, is_lasting=True, waits_for_jobs=False)
    client, served = socket.socketpair()
    with client, served:
        job = Running(served)
        job.sock = None
        parker._receive(job)
    listener.close()
