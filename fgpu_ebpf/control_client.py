"""The client side of the control socket, which sends one request to the agent and returns the answer.

This module runs in the commands, in any thread, and in the event loop of the device plugin. The module imports nothing
that only the agent needs, because a command has to start quickly.
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
PARKED = 5  # the exit code if the agent refuses a request because tenants are parked
GROUP = "fgpu"  # members of this group may send requests that change nothing
UNIT = "fgpu-agent"
_UNIT_FILES = (Path("/etc/systemd/system"), Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))
_BOOTED = Path("/run/systemd/system")  # exists if systemd is this host's init
_LOCKS = Path("/proc/locks")


class RequestError(Exception):
    """An error in a request, or the agent's refusal of a request. `code` is the exit code for the command."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


class NoAnswerError(ConnectionError):
    """The error of a missing answer. `fix`: what to do. `denied`: an agent runs, to which this user has no access."""

    def __init__(self, text: str, fix: str, denied: bool = False) -> None:
        super().__init__(text)
        self.fix = fix
        self.denied = denied


def agent_command(verb: str = "start") -> str:
    """Return the command that starts or restarts the agent on this host: `systemctl` if the agent has a unit."""
    return f"systemctl {verb} {UNIT}" if has_unit() else "fgpu agent"


def has_unit() -> bool:
    """Return whether systemd runs on this host and the package with the agent's unit is installed."""
    return _BOOTED.is_dir() and any((folder / f"{UNIT}.service").exists() for folder in _UNIT_FILES)


def call(run_dir: Path, request: dict[str, Any], patience_seconds: float = PATIENCE_SECONDS) -> Any:
    """Send a request to the agent and return the agent's answer.

    Args:
        run_dir: the folder of the agent's sockets.
        request: the request, which is sent as JSON.
        patience_seconds: the timeout of each operation on the socket.

    Raises:
        ConnectionError: there is no answer; NoAnswerError if the reason is known.
        RequestError: the agent refuses the request.
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
    """Send a request as call() does, but without blocking the event loop. `patience_seconds` limits the whole request.

    Raises:
        ConnectionError: there is no answer; NoAnswerError if the reason is known.
        RequestError: the agent refuses the request.
    """
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
    """Return the error for a failed request: no agent runs, or this user lacks a permission.

    The kernel checks the permission first, so a PermissionError does not prove that an agent runs.
    """
    if isinstance(error, PermissionError) and _is_running(run_dir):
        text = f"the agent runs, but this user has no access to it ({run_dir}/control.sock: {error.strerror})"
        return NoAnswerError(text, _permission(), denied=True)
    why = "timed out" if isinstance(error, TimeoutError) else error.strerror or error
    fix = f"start the agent with `{agent_command()}`"
    return NoAnswerError(f"no agent answers at {run_dir}/control.sock ({why})", fix)


def _is_running(run_dir: Path) -> bool:
    """Return whether a process holds the agent's lock. Every user can read the inodes of locks in /proc/locks."""
    try:
        inode = os.stat(run_dir / file_locks.AGENT).st_ino
        locked = {line.split()[-3].rpartition(":")[2] for line in _LOCKS.read_text(encoding="ascii").splitlines()}
    except (OSError, IndexError):
        return True  # it is unknown whether an agent runs; only the missing permission is certain
    return str(inode) in locked


def _permission() -> str:
    """Return the fix for a user without the permission to read."""
    try:
        grp.getgrnam(GROUP)
    except KeyError:
        return "use sudo"
    return f"use sudo, or `sudo usermod -aG {GROUP} $USER` and log in again"


def _read(data: bytes) -> Any:
    if not data.endswith(b"\n"):
        raise ConnectionError("the agent closed the connection without a complete answer: read the agent's log")
    answer = json.loads(data)
    if "error" in answer:
        raise RequestError(answer["error"], answer["code"])
    return answer["ok"]
