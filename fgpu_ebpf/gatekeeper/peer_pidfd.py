"""Identification of the process at the other end of a socket, as a pidfd.

This module runs in the gatekeeper's main thread. A pid that may belong to another process by now is not accepted: the
functions raise OSError, and the process registers again.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from time import monotonic_ns

from fgpu_ebpf.linux.peer_credentials import pid_of

SO_PEERPIDFD = 77  # since Linux 6.5


class PeerIdentifier:
    """The identification of the processes at the other ends of the gatekeeper's connections.

    Args:
        ended_ns: returns a time after which no process with a given pid has exited; None: unknown.
    """

    def __init__(self, ended_ns: Callable[[int], int | None]) -> None:
        self._ended_ns = ended_ns
        self._alone_ns = monotonic_ns()

    def none_waiting(self, since_ns: int) -> None:
        """Record that at some moment after `since_ns` no connection was waiting.

        Consequently every connection that is accepted later was made after `since_ns`.
        """
        self._alone_ns = since_ns

    def pidfd(self, sock: socket.socket) -> int:
        """Return a pidfd of the process that connected, which the caller closes. Raise OSError on failure.

        Before Linux 6.5, the kernel reports only the pid of the peer. The method then opens a pidfd by that pid, and
        accepts the pidfd only if no process with that pid has exited since a moment before the connection.
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
        raise ProcessLookupError(errno.ESRCH, "the process may have exited, and another process may have this pid")
