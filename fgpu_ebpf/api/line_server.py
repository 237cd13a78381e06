"""A server that receives one line from each connection and sends one line back, without blocking.

This module runs in the agent's main loop, for the control socket. There are at most MOST_PEERS connections. A
connection is closed if it fails, does not send its line within LINE_SECONDS, or does not read the answer within
ANSWER_SECONDS.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from fgpu_ebpf.linux import procfs

MOST_PEERS = 64
MOST_LINE_BYTES = 1 << 16
LINE_SECONDS, ANSWER_SECONDS = 2.0, 10.0
AT_ONCE = 16  # connections to accept before the main loop continues


@dataclass(eq=False, slots=True)
class _Peer:
    sock: socket.socket
    until: float
    line: bytearray = field(default_factory=bytearray)
    answer: memoryview | None = None


class LineServer:
    """The connections of the server. `answer` gets a connection's socket and line, which may be incomplete."""

    def __init__(self, selector: selectors.BaseSelector, answer: Callable[[socket.socket, bytes], bytes]) -> None:
        self._selector, self._answer = selector, answer
        self._peers: dict[_Peer, None] = {}
        self._paused: list[selectors.SelectorKey] = []  # listeners that are not watched until expire()

    def __len__(self) -> int:
        return len(self._peers)

    def accept(self, listener: socket.socket) -> None:
        """Accept up to AT_ONCE connections.

        If there are more than MOST_PEERS connections, close the oldest connection. During a shortage of descriptors or
        memory, the listener is not watched until expire(), because it stays readable.
        """
        try:
            for _ in range(AT_ONCE):
                sock, _ = listener.accept()
                sock.setblocking(False)
                peer = _Peer(sock, time.monotonic() + LINE_SECONDS)
                self._peers[peer] = None
                self._selector.register(sock, selectors.EVENT_READ, partial(self._receive, peer))
                self._receive(peer)  # most clients have sent the whole line by now
                if len(self._peers) > MOST_PEERS:
                    self._drop(next(iter(self._peers)))
        except BlockingIOError:  # no other connection waits
            pass
        except OSError as error:
            if error.errno in procfs.SHORTAGES:
                self._paused.append(self._selector.unregister(listener))

    def expire(self) -> None:
        """Close connections that have not sent a line, or not read the reply, before their timeout.

        Then watch listeners that were paused.
        """
        now = time.monotonic()
        for peer in [peer for peer in self._peers if peer.until < now]:
            self._drop(peer)
        while self._paused:
            listener, _, events, data = self._paused[-1]
            self._selector.register(listener, events, data)  # after an error, the next call tries again
            self._paused.pop()

    def close(self) -> None:
        """Close all connections."""
        for peer in list(self._peers):
            self._drop(peer)

    def _receive(self, peer: _Peer) -> None:
        try:
            more = peer.sock.recv(MOST_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._drop(peer)
            return
        peer.line += more
        if more and not peer.line.endswith(b"\n") and len(peer.line) <= MOST_LINE_BYTES:
            return
        peer.answer = memoryview(self._answer(peer.sock, bytes(peer.line)))
        peer.until = time.monotonic() + ANSWER_SECONDS
        self._selector.modify(peer.sock, selectors.EVENT_WRITE, partial(self._send, peer))
        self._send(peer)

    def _send(self, peer: _Peer) -> None:
        assert peer.answer is not None
        try:
            peer.answer = peer.answer[peer.sock.send(peer.answer) :]
        except BlockingIOError:
            return
        except OSError:
            self._drop(peer)
            return
        if not peer.answer:
            self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        if peer in self._peers:
            del self._peers[peer]
            with contextlib.suppress(KeyError):  # a modify() that fails, for example without memory, removes the socket
                self._selector.unregister(peer.sock)
            peer.sock.close()
