"""Worker threads that take connections from processes that may not connect to the gatekeeper's socket.

Such a process creates a pair of sockets, and reports the descriptor of one end (News.KNOCK). To copy a descriptor, the
kernel takes a lock that a process holds during execve(), and to close a copy of any other file is a request to that
file's file system. Both may block without end. A process that blocks the copy blocks one worker thread and the queue of
its bound owner (`linux.worker_threads`), but not the gatekeeper's main loop.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress

from fgpu_ebpf.gatekeeper.connections import HELLO_BYTES, well_formed
from fgpu_ebpf.ledger.ring_buffer import Event
from fgpu_ebpf.linux.peer_credentials import pid_of
from fgpu_ebpf.linux.pidfd import copy_descriptor
from fgpu_ebpf.linux.worker_threads import Workers

MOST_QUEUED = 64  # of one bound owner; the shim of a process without an answer knocks again


class Knocks:
    """The worker threads. They call `wake` when take() has something to return."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._workers: Workers[int, Event, socket.socket | str] = Workers(
            lambda event: taken(event.tgid, event.device), lambda _: True, wake, MOST_QUEUED
        )
        self.due_ns, self.go = self._workers.due_ns, self._workers.go

    def want(self, event: Event) -> None:
        """Queue a knock for the next go(), unless its bound owner has too many queued knocks."""
        self._workers.want(event.bytes, event)

    def take(self) -> list[tuple[socket.socket | str, int]]:
        """Return what taken() has returned since the last call, with the processor time in nanoseconds."""
        return [(done.result, done.took_ns) for done in self._workers.take()]


def taken(pid: int, descriptor: int) -> socket.socket | str:
    """Take a connection from a process, which has both ends. `descriptor` is one end.

    The process may have closed the descriptor, and the number may belong to another file. Therefore nothing is read
    unless the kernel has recorded this process as the peer, and the first message is a hello. A file that is not a
    socket is not copied.

    Returns:
        A socket, or the name of the gatekeeper's counter to increment.
    """
    try:
        if not os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith("socket:["):
            return "malformed"
        copy = copy_descriptor(pid, descriptor)
    except OSError:  # the process has exited, or has closed the descriptor
        return "gone"
    try:
        sock = socket.socket(fileno=copy)
    except OSError:  # the process has replaced the socket by another file
        os.close(copy)
        return "malformed"
    if has_hello(sock, pid):
        return sock
    sock.close()
    return "malformed"


def has_hello(sock: socket.socket, pid: int) -> bool:
    """Return True if this socket is of the kind that shims use, its peer is this process, and a hello comes next."""
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET) or pid_of(sock) != pid:
        return False
    with suppress(OSError):  # there is no message
        return well_formed(sock.recv(HELLO_BYTES + 1, socket.MSG_DONTWAIT | socket.MSG_PEEK))
    return False
