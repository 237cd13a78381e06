"""The control socket, as who asks sees it.

Owns: one request and its answer. Never: imports what the agent needs: a command has to be there at once. On failure:
ConnectionError where no agent answers, RequestError where it says no.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 30.0


class RequestError(Exception):
    """What is wrong with a request; `code` is the client's exit code."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def call(run_dir: Path, request: dict[str, Any], patience_seconds: float = PATIENCE_SECONDS) -> Any:
    """Asks the agent. Raises ConnectionError, RequestError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(patience_seconds)
        try:
            sock.connect(str(run_dir / "control.sock"))
            sock.sendall(json.dumps(request).encode() + b"\n")
            data = b"".join(iter(lambda: sock.recv(1 << 20), b""))
        except OSError as error:
            raise ConnectionError(f"no agent answers at {run_dir}/control.sock ({error.strerror or error})") from error
    return _read(data)


async def ask(run_dir: Path, request: dict[str, Any], patience_seconds: float = PATIENCE_SECONDS) -> Any:
    """The same, for a process that has other things to do meanwhile. Raises ConnectionError, RequestError."""
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
        why = "not in time" if isinstance(error, TimeoutError) else error.strerror or error
        raise ConnectionError(f"no agent answers at {run_dir}/control.sock ({why})") from error
    return _read(data)


def _read(data: bytes) -> Any:
    if not data.endswith(b"\n"):
        raise ConnectionError("the agent hung up")
    answer = json.loads(data)
    if "error" in answer:
        raise RequestError(answer["error"], answer["code"])
    return answer["ok"]
