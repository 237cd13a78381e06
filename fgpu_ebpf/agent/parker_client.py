"""Requests to the parker, which is the process that makes the driver's checkpoint calls.

A request is one line of JSON on its own connection. The parker answers with lines that report the progress, and a last
line with the result or the states. This module does not block, because the agent's main loop reads the lines. If the
connection ends without a result, or the answer takes too long, the caller has to request the states.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SOCKET = "parker.sock"
MOST_LINE_BYTES = 1 << 20
STATE = "state"
LOCK_SECONDS = 5.0
DEADLINE_SECONDS = 30.0
SECONDS_A_GIB = 1.0  # added to the deadline; the slowest measured copy took half a second
PATIENCE_SECONDS, SLOWEST = 60.0, 128 << 20  # beyond the deadline, and bytes a second; the parker's values are smaller
PACKAGED = Path("/usr/lib/fgpu/fgpu-parker")  # of the .deb and the .rpm, which do not put this program into PATH

Line = dict[str, Any]


class Request:
    """A request that has been sent.

    `on_line` gets each line of the answer as an object. `on_end` is called when the connection has ended. After
    close(), neither function is called.
    """

    def __init__(
        self, selector: selectors.BaseSelector, sock: socket.socket, seconds: float,
        on_line: Callable[[Line], None], on_end: Callable[[], None],
    ) -> None:  # fmt: skip
        self._selector, self._sock = selector, sock
        self._on_line, self._on_end = on_line, on_end
        self._buffer = bytearray()
        self._is_open = True
        self.until = time.monotonic() + seconds
        selector.register(sock, selectors.EVENT_READ, self._receive)

    def _receive(self) -> None:
        try:
            more = self._sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        self._buffer += more
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        for line in lines:
            answer = _object(bytes(line))
            if answer is not None and self._is_open:
                self._on_line(answer)
        if self._is_open and (not more or len(rest) > MOST_LINE_BYTES):
            self.close()
            self._on_end()

    def close(self) -> None:
        """Close the connection. The parker finishes a job that has begun."""
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._sock)
            self._sock.close()


def connected(run_dir: Path) -> socket.socket | None:
    """Return a connection to the parker, or None if no parker listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(str(run_dir / SOCKET))
    except OSError:
        sock.close()
        return None
    return sock


def missing(run_dir: Path) -> str:
    """Return how to start the parker if no parker listens, or an empty text if a parker listens."""
    if sock := connected(run_dir):
        sock.close()
        return ""
    return f"the parker does not run: {fix()}"


def fix() -> str:
    """Return how to start the parker."""
    program = PACKAGED if PACKAGED.exists() else PACKAGED.name
    return f"start the parker: systemctl restart fgpu-parker.socket, or run `{program}`"


def ask(
    selector: selectors.BaseSelector, sock: socket.socket, op: str, members: Iterable[tuple[int, int]], bytes_: int,
    on_line: Callable[[Line], None], on_end: Callable[[], None],
) -> Request | None:  # fmt: skip
    """Send a request on a new connection, and close the connection if the request cannot be sent.

    Args:
        selector: the selector of the main loop.
        sock: the connection that connected() returned.
        op: `park`, `wake` or STATE.
        members: the processes, each as pid and start time in clock ticks since boot.
        bytes_: the sum of the processes' device memory.
        on_line: the function of Request.
        on_end: the function of Request.

    Returns:
        The request, or None if the request was not sent. The caller compares the `until` of the request with the time.
    """
    deadline = DEADLINE_SECONDS + SECONDS_A_GIB * bytes_ / (1 << 30)
    request = {
        "op": op, "processes": [{"pid": pid, "started": started} for pid, started in members], "bytes": bytes_,
        "lock_ms": round(LOCK_SECONDS * 1000), "deadline_ms": round(deadline * 1000),
    }  # fmt: skip
    line = json.dumps(request).encode() + b"\n"
    try:
        if sock.send(line) == len(line):
            return Request(selector, sock, deadline + PATIENCE_SECONDS + bytes_ / SLOWEST, on_line, on_end)
    except OSError:
        pass
    sock.close()
    return None


def _object(line: bytes) -> Line | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
