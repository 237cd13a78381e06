"""The client side of the control socket: one request, and its answer or the reason why there is none.

The commands, `fgpu top` and the device plugin use this module. A command has to start quickly, so this imports nothing
that only the agent needs.
"""

from __future__ import annotations

import grp
import json
import os
import socket
from pathlib import Path
from typing import Any

from fgpu_ebpf.linux import file_locks

PATIENCE_SECONDS = 30.0
GROUP = "fgpu"  # its members may read
UNIT = "fgpu-agent"
_UNIT_FILES = (Path("/etc/systemd/system"), Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))
_BOOTED = Path("/run/systemd/system")  # systemd is this host's init
_LOCKS = Path("/proc/locks")


class RequestError(Exception):
    """An error in a request, or the agent's refusal; `code` is the client's exit code."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


class NoAnswerError(ConnectionError):
    """The agent has not answered; `fix` says what to do. `denied`: an agent runs, but this user may not ask it."""

    def __init__(self, text: str, fix: str, denied: bool = False) -> None:
        super().__init__(text)
        self.fix = fix
        self.denied = denied


def agent_command(verb: str = "start") -> str:
    """Return the command that starts (or restarts) the agent on this host: its unit if the package is installed."""
    return f"systemctl {verb} {UNIT}" if has_unit() else "fgpu agent"


def has_unit() -> bool:
    """Return whether systemd runs on this host and the package with the agent's unit is installed."""
    return _BOOTED.is_dir() and any((folder / f"{UNIT}.service").exists() for folder in _UNIT_FILES)


def call(run_dir: Path, request: dict[str, Any], patience_seconds: float = PATIENCE_SECONDS) -> Any:
    """Send a request to the agent and return its answer. Raises ConnectionError, RequestError.

    Args:
        run_dir: the folder of the agent's sockets.
        request: the request, to be sent as JSON.
        patience_seconds: the longest wait for each step.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(patience_seconds)
        try:
            sock.connect(str(run_dir / "control.sock"))
            sock.sendall(json.dumps(request).encode() + b"\n")
            data = b"".join(iter(lambda: sock.recv(1 << 20), b""))
        except OSError as error:
            raise _no_answer(run_dir, error) from error
    return _read(data)


async def ask(run_dir: Path, request: dict[str, Any], patience_seconds: float = PATIENCE_SECONDS) -> Any:
    """Send a request like call(), without blocking the process's event loop. Raises ConnectionError, RequestError."""
    import asyncio

    try:
        async with asyncio.timeout(patience_seconds):
            reader, writer = await asyncio.open_unix_connection(str(run_dir / "control.sock"))
            try:
                writer.write(json.dumps(request).encode() + b"\n")
                data = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise _no_answer(run_dir, error) from error
    return _read(data)


def _no_answer(run_dir: Path, error: OSError) -> NoAnswerError:
    """Tell a user without permission from a host without an agent: the kernel checks the permission first."""
    if isinstance(error, PermissionError) and _is_running(run_dir):
        text = f"the agent runs, but this user has no access to it ({run_dir}/control.sock: {error.strerror})"
        return NoAnswerError(text, _permission(), denied=True)
    why = "not in time" if isinstance(error, TimeoutError) else error.strerror or error
    return NoAnswerError(f"no agent answers at {run_dir}/control.sock ({why})", f"start it with `{agent_command()}`")


def _is_running(run_dir: Path) -> bool:
    """Return whether a process holds the agent's lock; every user can read the inodes of locks in /proc/locks."""
    try:
        inode = os.stat(run_dir / file_locks.AGENT).st_ino
        locked = {line.split()[-3].rpartition(":")[2] for line in _LOCKS.read_text(encoding="ascii").splitlines()}
    except (OSError, IndexError):
        return True  # unknown; it is only certain that permission is missing
    return str(inode) in locked


def _permission() -> str:
    """Return how a user gets the permission to read."""
    try:
        grp.getgrnam(GROUP)
    except KeyError:
        return "use sudo"
    return f"use sudo, or `sudo usermod -aG {GROUP} $USER` and log in again"


def _read(data: bytes) -> Any:
    if not data.endswith(b"\n"):
        raise ConnectionError("the agent closed the connection")
    answer = json.loads(data)
    if "error" in answer:
        raise RequestError(answer["error"], answer["code"])
    return answer["ok"]
