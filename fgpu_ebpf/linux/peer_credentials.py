"""The process at the other end of a Unix socket, as recorded by the kernel when the process connected (SO_PEERCRED)."""

from __future__ import annotations

import socket
import struct

_UCRED = struct.Struct("3i")  # pid, uid, gid


def pid_and_uid(sock: socket.socket) -> tuple[int, int]:
    """Return the pid and the uid that the process had when the process connected. Raise OSError on failure."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def pid_of(sock: socket.socket) -> int:
    """Return the pid that the process had when the process connected. Raise OSError on failure."""
    return pid_and_uid(sock)[0]
