"""The gatekeeper's process, as the agent sees it: started when there is none, ended with the agent that started it.

Owns: the child. Never: ends one that a service runs, but for `fgpu detach`. On failure: one that does not come up is
named by `wait`; one that dies is replaced within a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from fgpu_ebpf import heap, locks, pages
from fgpu_ebpf.checks import Check

log = logging.getLogger("fgpu.agent")
UP_SECONDS = 5.0
PATIENCE_SECONDS = 2.0  # a shim's
ABSENT = Check(
    "gatekeeper", False, "there is none: programs that start get no memory",
    "the agent starts another within a second, or systemctl restart fgpu-gatekeeper",
)  # fmt: skip
OWN_SECONDS, OTHERS_SECONDS = 0.5, 1.0  # without a gatekeeper, until the agent starts one


class Keeper:
    """At most one gatekeeper of ours."""

    def __init__(self, run_dir: Path, pins: Path) -> None:
        self._run_dir, self._lock = run_dir, run_dir / locks.GATEKEEPER
        # -P: else modules would be looked for in the folder first that the agent was started in, whosever that is.
        module = [sys.executable, "-P", "-m", "fgpu_ebpf.gatekeeper"]
        self._command = [*module, "--stand-in", "--run-dir", str(run_dir), "--pins", str(pins)]
        self._child: subprocess.Popen[bytes] | None = None
        self._seen = 0.0
        self.is_missed = False  # by keep()

    def start(self) -> None:
        """Starts one, unless there is one that a service runs or that outlived an agent."""
        self._seen = time.monotonic()
        if locks.is_locked(self._lock):
            return
        environment = {"PATH": os.defpath, "PYTHONPATH": str(Path(__file__).parent.parent), **heap.ENVIRONMENT}
        self._child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, env=environment)

    def keep(self) -> None:
        """Starts one where there is none; where a service ran one, it has the time to do so again."""
        own, was_missed = self._child and self._child.poll() is None, self.is_missed
        self.is_missed = not own and not locks.is_locked(self._lock)
        if not self.is_missed or not (was_missed or self._child):  # others' may have been there until a moment ago
            self._seen = time.monotonic()
        if not self.is_missed:
            return
        if time.monotonic() - self._seen < (OWN_SECONDS if self._child else OTHERS_SECONDS):
            return
        log.warning("the gatekeeper is gone: starting another")
        self.start()

    def wait(self) -> bool:
        """Until one answers; False: none came up in time."""
        deadline = time.monotonic() + UP_SECONDS
        while not self.answers():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def answers(self) -> bool:
        """Return whether a gatekeeper holds its lock and accepts connections at its socket."""
        return is_up(self._run_dir) and _accepts(self._run_dir / "shim/shim.sock")

    def stop(self) -> None:
        """Ends ours."""
        if self._child is None or self._child.poll() is not None:
            return
        self._child.terminate()
        try:
            self._child.wait(2.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def check(run_dir: Path) -> Check:
    """A gatekeeper is there and answers, asked as a shim asks."""
    lock = run_dir / locks.GATEKEEPER
    if not locks.is_locked(lock):
        return ABSENT
    pid = locks.holder(lock)
    if not _greets(run_dir / "shim/shim.sock"):
        silent = f"pid {pid} does not answer within {PATIENCE_SECONDS:g} s: programs that start get no memory"
        return Check("gatekeeper", False, silent, f"kill -9 {pid}: {ABSENT.mend}")
    return Check("gatekeeper", True, f"pid {pid}")


def _greets(place: Path) -> bool:
    """Whoever asks is unmanaged, or a tenant's process that keeps none of the pages."""
    hello = pages.Hello(magic=pages.MAGIC, version=pages.LAYOUT, size=ctypes.sizeof(pages.Hello))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        try:
            sock.connect(str(place))
            sock.send(bytes(hello))
            return bool(sock.recv(4096))
        except OSError:
            return False


def _accepts(place: Path) -> bool:
    """Return whether a process listens at a socket; none does at a folder, or at what a dead process left."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(place))
        except BlockingIOError:  # a listener with a full queue
            return True
        except OSError:
            return False
        return True


def is_up(run_dir: Path) -> bool:
    """A gatekeeper holds its lock and its socket; whether it answers takes a question (`check`)."""
    # Strings: see is_locked.
    return locks.is_locked(f"{run_dir}/{locks.GATEKEEPER}") and os.path.exists(f"{run_dir}/shim/shim.sock")


def end_any(run_dir: Path) -> None:
    """Ends whichever gatekeeper holds the lock, an earlier agent's too: it would make its folder again."""
    lock, deadline = run_dir / locks.GATEKEEPER, time.monotonic() + UP_SECONDS
    with contextlib.suppress(OSError):
        while (pid := locks.holder(lock)) and locks.is_locked(lock) and time.monotonic() < deadline:
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.02)
