"""The supervisor of the gatekeeper, which starts a missing gatekeeper, and stops the agent's gatekeeper with the agent.

The supervisor runs in the agent's main loop, `check` runs in `fgpu doctor`, and `end_any` also runs in `fgpu detach`
without an agent. A gatekeeper that a systemd service runs is stopped only by `fgpu detach` or a change of the layout.
If the agent's own gatekeeper exits, the agent starts another gatekeeper within a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgpu_ebpf import abi
from fgpu_ebpf.check import Check
from fgpu_ebpf.linux import file_locks, malloc
from fgpu_ebpf.snapshot import SlicesView

log = logging.getLogger("fgpu.agent")
UP_SECONDS = 5.0
PATIENCE_SECONDS = 2.0  # how long a shim waits for the answer to its first hello
HANG_UP_SECONDS = 0.5  # the longest wait for a gatekeeper of another layout to close the connection after a hello
ABSENT = Check(
    "gatekeeper", False, "not running: new programs are refused memory",
    "wait for the agent to start a gatekeeper (1 s), or run: systemctl restart fgpu-gatekeeper",
)  # fmt: skip
NS = 1e9
# The delays before the agent starts a gatekeeper: after the exit of its own gatekeeper, and of a service's gatekeeper.
OWN_SECONDS, OTHERS_SECONDS = 0.5, 1.0


class GatekeeperProcess:
    """The agent's own gatekeeper. An agent has at most one gatekeeper of its own."""

    def __init__(self, run_dir: Path, pins: Path) -> None:
        self._run_dir, self._lock = run_dir, run_dir / file_locks.GATEKEEPER
        # Without -P, Python would first search modules in the current folder, which may belong to any user. With -S,
        # code in .pth files does not delay the start; the gatekeeper needs no other packages.
        module = [sys.executable, "-P", "-S", "-m", "fgpu_ebpf.gatekeeper"]
        self._command = [*module, "--stand-in", "--run-dir", str(run_dir), "--pins", str(pins)]
        self._child: subprocess.Popen[bytes] | None = None
        self._seen = 0.0  # the monotonic time at which a gatekeeper last ran
        self.is_missed = False  # no gatekeeper runs; set by keep()

    def start(self, layout_changed: bool = False) -> None:
        """Start a gatekeeper, unless a gatekeeper of this agent, of a service or of an earlier agent runs.

        Args:
            layout_changed: a running gatekeeper may be of a version that rejects the hellos of this version's shims.
                Such a gatekeeper is stopped and replaced, by its service or by this agent.
        """
        self._seen = time.monotonic()
        if self._child and self._child.poll() is None:
            return
        if layout_changed and file_locks.is_locked(self._lock) and _hangs_up(self._run_dir / "shim/shim.sock"):
            log.warning("the agent stops the running gatekeeper, which has another layout of shared pages")
            end_any(self._run_dir)
        if file_locks.is_locked(self._lock):
            return
        environment = {"PATH": os.defpath, "PYTHONPATH": str(Path(__file__).parents[2]), **malloc.ENVIRONMENT}
        self._child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, env=environment)

    def keep(self) -> None:
        """Start a gatekeeper if no gatekeeper runs.

        If a systemd service ran the last gatekeeper, the service has OTHERS_SECONDS to restart the gatekeeper.
        """
        own, was_missed = self._child and self._child.poll() is None, self.is_missed
        self.is_missed = not own and not file_locks.is_locked(self._lock)
        if not self.is_missed or not (was_missed or self._child):  # a service's gatekeeper may have exited just now
            self._seen = time.monotonic()
        if not self.is_missed:
            return
        if time.monotonic() - self._seen < (OWN_SECONDS if self._child else OTHERS_SECONDS):
            return
        log.warning("the gatekeeper has exited: starting a new gatekeeper")
        self.start()

    def wait(self) -> bool:
        """Wait until a gatekeeper accepts connections.

        Return False if no gatekeeper accepts a connection within UP_SECONDS.

        A gatekeeper that exits during the wait is replaced.
        """
        deadline = time.monotonic() + UP_SECONDS
        while not self.answers():
            if time.monotonic() > deadline:
                return False
            self.keep()
            time.sleep(0.005)
        return True

    def answers(self) -> bool:
        """Return whether a gatekeeper holds the gatekeeper's lock and accepts connections at its socket."""
        return is_up(self._run_dir) and _accepts(self._run_dir / "shim/shim.sock")

    def stop(self) -> None:
        """Stop the agent's own gatekeeper. If the gatekeeper does not exit within 2 s, send SIGKILL."""
        if self._child is None or self._child.poll() is not None:
            return
        self._child.terminate()
        try:
            self._child.wait(2.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def check(run_dir: Path) -> Check:
    """Check that a gatekeeper runs and answers a shim's hello within PATIENCE_SECONDS."""
    lock = run_dir / file_locks.GATEKEEPER
    if not file_locks.is_locked(lock):
        return ABSENT
    pid = file_locks.holder(lock)
    if not _hello(run_dir / "shim/shim.sock", PATIENCE_SECONDS):
        silent = f"pid {pid} does not answer within {PATIENCE_SECONDS:g} s: new programs are refused memory"
        return Check("gatekeeper", False, silent, f"kill -9 {pid}, then {ABSENT.fix}")
    return Check("gatekeeper", True, f"pid {pid}")


def _hangs_up(place: Path) -> bool:
    """Return whether the gatekeeper closes a connection with a hello of this layout."""
    return _hello(place, HANG_UP_SECONDS) == b""


def _hello(place: Path, seconds: float) -> bytes | None:
    """Send a hello as a shim does, and return the reply without the descriptors of pages.

    The result is empty if there is no gatekeeper or the gatekeeper closes the connection. The result is None if there
    is no reply within `seconds`.
    """
    hello = abi.Hello(magic=abi.MAGIC, version=abi.LAYOUT, size=ctypes.sizeof(abi.Hello))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(seconds)
        try:
            sock.connect(str(place))
            sock.send(bytes(hello))
            return sock.recv(4096)
        except TimeoutError:
            return None
        except OSError:
            return b""


def _accepts(place: Path) -> bool:
    """Return whether a process listens at the path.

    The result is False for a folder or the socket of an exited process.
    """
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
    """Return whether a gatekeeper has its lock and its socket. Only `check` tests whether the gatekeeper answers."""
    # The paths are strings instead of Paths, because this function is called often: see is_locked.
    return file_locks.is_locked(f"{run_dir}/{file_locks.GATEKEEPER}") and os.path.exists(f"{run_dir}/shim/shim.sock")


def counts(run_dir: Path) -> dict[str, Any]:
    """Return the gatekeeper's counters, or an empty dict if the file of the counters is missing or cannot be read."""
    try:
        with open(f"{run_dir}/gatekeeper.json", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def slices(counted: Mapping[str, Any], device: int) -> SlicesView | None:
    """Return the turns on a device from the result of counts(), or None if the result does not have the device."""
    try:
        slices = counted["slices"]
        of_device = slices["devices"][str(device)]
        bounds = tuple(ns / NS for ns in slices["bounds_ns"])
        drains = tuple(of_device["drains"])
        lent = of_device.get("lent_ns", 0) / NS  # an older gatekeeper does not count lent time
        return SlicesView(
            of_device["switches"], of_device["overruns"], of_device["drain_ns"] / NS, bounds, drains, lent
        )
    except (KeyError, TypeError):
        return None


def end_any(run_dir: Path) -> None:
    """Stop the gatekeeper that holds the lock, whichever agent started it, and wait up to UP_SECONDS for the exit.

    A gatekeeper that keeps running would create the folder of its socket again.
    """
    lock, deadline = run_dir / file_locks.GATEKEEPER, time.monotonic() + UP_SECONDS
    with contextlib.suppress(OSError):
        while (pid := file_locks.holder(lock)) and file_locks.is_locked(lock) and time.monotonic() < deadline:
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.02)
