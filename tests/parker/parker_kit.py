"""A parker process, and the requests of its clients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tests.sim.checkpoint_kit import DATA, ask
from tests.sim.conftest import ROOT, Machine
from tests.support.wait import Deadline

SECONDS = 30.0
HOLDS = DATA + "start(); p = alloc(100 << 20); write(p, 1 << 20)"
IS_INTACT = "is_intact(p, 1 << 20)"
SIZE = 700 << 20  # more than such a program holds


def started(pid: int) -> int:
    """Return the start time of a process, in clock ticks."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def named(*pids: int) -> list[dict[str, int]]:
    return [{"pid": pid, "started": started(pid)} for pid in pids]


class Connection:
    """A connection with one request."""

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(str(path))
        self.sock.sendall(json.dumps(request).encode() + b"\n")
        self.lines: TextIO = self.sock.makefile(encoding="utf-8")

    def replies(self) -> list[dict[str, Any]]:
        """Return all replies, when the parker has closed the connection."""
        with self.sock, self.lines:
            return [json.loads(line) for line in self.lines]


class Parker:
    """A parker in the mount namespace of a machine."""

    def __init__(self, machine: Machine, root: Path | None = None, *options: str) -> None:
        self._machine, self._root, self._options = machine, root or machine.tools, options
        self.run_dir = Path(f"/proc/{machine.server.pid}/root/run/fgpu")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "fgpu_ebpf.parker", "--driver-root", str(self._root), *self._options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.path.unlink(missing_ok=True)
        process = subprocess.Popen(self._machine.command(*words), env=environment, cwd="/")
        deadline = Deadline(10)
        while not self.path.exists():
            assert process.poll() is None
            assert not deadline.is_over()
            time.sleep(0.01)
        return process

    @property
    def path(self) -> Path:
        return self.run_dir / "parker.sock"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process = self._start()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(10) == 0

    def begin(self, op: str, *pids: int, **more: Any) -> Connection:
        return Connection(self.path, {"op": op, "processes": named(*pids), "bytes": SIZE, **more})

    def replies(self, op: str, *pids: int, **more: Any) -> list[dict[str, Any]]:
        return self.begin(op, *pids, **more).replies()

    def result(self, op: str, *pids: int, **more: Any) -> dict[str, Any]:
        """Return the last reply."""
        return self.replies(op, *pids, **more)[-1]

    def states(self, *pids: int) -> list[str]:
        reply = self.result("state", *pids)
        return [reply["states"][str(pid)] for pid in pids]

    def worker(self) -> int:
        """Return the pid of the process of the only job, when it exists."""
        deadline = Deadline(10)
        while True:
            found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            if len(found) == 1:
                return int(found[0])
            assert not deadline.is_over(), found
            time.sleep(0.005)


def waits_in_driver(pid: int) -> None:
    """Wait until a process waits for the reply of the driver."""
    deadline = Deadline(10)
    while Path(f"/proc/{pid}/wchan").read_text() != "__skb_wait_for_more_packets":
        assert not deadline.is_over()
        time.sleep(0.005)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    assert os.waitpid(pid, os.WUNTRACED)[1] == signal.SIGSTOP << 8 | 0x7F
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def is_intact(program: subprocess.Popen[str]) -> bool:
    """Return whether the program runs and has its data."""
    return ask(program, IS_INTACT) == "True"
