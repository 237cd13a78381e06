"""Whose socket it is that came to the door, as a pidfd.

Owns: when nobody was waiting there. Never: believes a pid that may be another's by now. On failure: OSError; whoever
it was says hello again.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from time import monotonic_ns

_PEERCRED = struct.Struct("3i")
SO_PEERPIDFD = 77  # Linux 6.5


def pid_of(sock: socket.socket) -> int:
    """Who connected, as we called it then. Raises OSError."""
    return int(_PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))[0])


class Visitors:
    """`ended_ns` says until when a process of a pid may have ended last; None: nobody knows."""

    def __init__(self, ended_ns: Callable[[int], int | None]) -> None:
        self._ended_ns = ended_ns
        self._alone_ns = monotonic_ns()

    def alone(self, since_ns: int) -> None:
        """Nobody was waiting at some moment after this one: whoever comes in has connected later."""
        self._alone_ns = since_ns

    def pidfd(self, sock: socket.socket) -> int:
        """A pidfd of who connected, which the caller closes. Raises OSError.

        Where the socket knows a pid alone (Linux before 6.5), it is that process if none of that pid has ended since
        before it connected: it had the pid then.
        """
        try:
            return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
        pid = pid_of(sock)
        pidfd = os.pidfd_open(pid)
        ended_ns = self._ended_ns(pid)
        if ended_ns is not None and ended_ns < self._alone_ns:
            return pidfd
        os.close(pidfd)
        raise ProcessLookupError(errno.ESRCH, "another may have its pid by now")
