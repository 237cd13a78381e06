"""Agents and gatekeepers that replace the service's.

They are forked, so that they start at once. They are killed at a point that tests/failpoints.py adds, or at a random
moment of their start.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.commands import ask
from tests.support.host import DRIVER_ROOT, ENVIRONMENT, LISTEN, ROOT, RUN_DIR, SHIM
from tests.support.service import Service
from tests.support.wait import eventually

FAILPOINTS = ROOT / "tests/failpoints.py"


def listens() -> bool:
    """Return whether a gatekeeper listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        return sock.connect_ex(f"{RUN_DIR}/shim/shim.sock") == 0


def answers() -> bool:
    """Return whether an agent answers and its limits are in force."""
    with contextlib.suppress(OSError, ValueError):
        return bool(ask(verb="ping"))
    return False


class Nursery:
    """The process that agents and gatekeepers are forked from."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, what: object) -> Any:
        """Send one line to the process, and return its answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Child:
    """An agent or a gatekeeper, with the methods of subprocess.Popen that tests need."""

    def __init__(self, nursery: Nursery, point: str, program: str, *words: str | Path) -> None:
        self._nursery = nursery
        self._ended: int | None = None
        self.pid: int = nursery.ask([point, program, *map(str, words)])

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        if self._ended is None:
            self._ended = self._nursery.ask(self.pid)
        return self._ended

    def wait(self, seconds: float) -> int:
        """Wait for the process, and return its exit status."""
        eventually(lambda: self.poll() is not None, seconds, f"the exit of process {self.pid}")
        assert self._ended is not None
        return self._ended

    def kill(self) -> None:
        """Kill the process with SIGKILL, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(30)


class Children:
    """One agent and one gatekeeper at a time, as the service would start them."""

    def __init__(self, nursery: Nursery, service: Service) -> None:
        self._nursery, self._service = nursery, service
        self._agent: Child | None = None
        self._gatekeeper: Child | None = None
        self._seconds = {"agent": 0.2, "gatekeeper": 0.1}  # seconds that a start takes

    def begin(self, program: str, point: str = "", *options: str | Path) -> Child:
        """Start a program that is killed at this point. Without a point, the program is not killed."""
        if program == "gatekeeper":
            return Child(self._nursery, point, program, "--run-dir", RUN_DIR)
        files = ("--config", self._service.config, "--policies", self._service.policies)
        where = ("--driver-root", DRIVER_ROOT, "--shim", SHIM, "--listen", LISTEN)
        return Child(self._nursery, point, program, *where, *files, *options)

    def start(self, program: str = "agent", point: str = "") -> Child:
        """Start a program, and return when it answers. For an agent, a gatekeeper runs then and limits are in force."""
        if program == "agent" and not listens():
            self.start("gatekeeper")
        begun, child = time.monotonic(), self.begin(program, point)
        is_up = answers if program == "agent" else listens
        eventually(lambda: child.poll() is not None or is_up(), 30, f"the {program}")
        last = self._service.log.read_text()[-500:]
        ended = child.poll()
        assert ended is None, f"the {program} ({point}) exited with {ended} during its start: {last}"
        self._seconds[program] = time.monotonic() - begun
        if program == "agent":
            self._agent = child
        else:
            self._gatekeeper = child
        return child

    def start_and_kill(self, program: str) -> None:
        """Kill a program with SIGKILL at a random moment of its start."""
        child = self.begin(program)
        time.sleep(random.uniform(0, self._seconds[program]))
        child.kill()

    def kill_agent(self) -> None:
        """Kill the agent with SIGKILL."""
        assert self._agent
        self._agent.kill()

    def kill_gatekeeper(self) -> None:
        """Kill every gatekeeper with SIGKILL."""
        if self._gatekeeper and self._gatekeeper.poll() is None:
            self._gatekeeper.kill()
        else:
            self._service.kill_gatekeeper()

    def end(self) -> None:
        """Kill all of them."""
        for child in (self._agent, self._gatekeeper):
            if child:
                child.kill()


@contextlib.contextmanager
def children_of(service: Service) -> Iterator[Children]:
    """Yield children whose output goes to the service's log. Children that still run are killed afterwards."""
    command = [sys.executable, FAILPOINTS]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with open(service.log, "ab") as log:
        process = subprocess.Popen(command, stderr=log, env={"PATH": ENVIRONMENT["PATH"]}, cwd=ROOT, **pipes)
    try:
        yield Children(Nursery(process), service)
    finally:
        process.communicate(timeout=30)
