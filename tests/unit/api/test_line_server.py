"""Tests of slow, silent and many peers of the control socket: they are closed, and do not delay other peers."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from fgpu_ebpf.api import line_server
from fgpu_ebpf.api.line_server import MOST_PEERS, LineServer
from tests.support.wait import Deadline

LONG = 4 << 20


def answer(_: socket.socket, line: bytes) -> bytes:
    """Return as many bytes as the line requests, or the line's length."""
    return b"x" * int(line) if line.strip().isdigit() else b"%d" % len(line)


class Host:
    """An event loop with a LineServer at a socket. call() connects a peer, and turn() runs the loop."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "sock")
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.listener.bind(self.path)
        self.listener.listen(128)
        self.peers = LineServer(self.selector, answer)
        self.selector.register(self.listener, selectors.EVENT_READ, lambda: self.peers.accept(self.listener))

    def call(self, line: bytes = b"") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(5)
        sock.connect(self.path)
        sock.sendall(line)
        return sock

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            for key, _ in self.selector.select(0):
                key.data()
            self.peers.expire()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    one = Host(tmp_path)
    yield one
    one.peers.close()
    one.listener.close()
    one.selector.close()


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    then = time.monotonic() + seconds
    monkeypatch.setattr(line_server.time, "monotonic", lambda: then)


def test_a_line_is_answered_as_soon_as_it_is_complete(host: Host) -> None:
    sock = host.call(b"ab")
    host.turn(3)
    assert len(host.peers) == 1
    sock.sendall(b"c\n")
    host.turn()
    assert sock.recv(9) == b"4"
    assert sock.recv(9) == b""
    assert len(host.peers) == 0


@pytest.mark.parametrize(("call", "line"), [("register", b"ab"), ("modify", b"ab\n")])
def test_a_connection_without_kernel_memory_for_its_entry_is_closed(
    host: Host, monkeypatch: pytest.MonkeyPatch, call: str, line: bytes
) -> None:
    """The kernel refuses memory in epoll_ctl(2). The connection is closed at its deadline, and others are served."""
    kernel = host.selector._selector  # type: ignore[attr-defined]
    refuse = Mock(side_effect=OSError(errno.ENOMEM, "epoll_ctl"))
    with monkeypatch.context() as short:
        short.setattr(host.selector, "_selector", Mock(wraps=kernel, **{call: refuse}))
        sock = host.call(line)
        with contextlib.suppress(OSError):
            host.turn()
    later(monkeypatch, 11)
    host.turn()
    with contextlib.suppress(ConnectionResetError):  # if the line was not read
        assert sock.recv(9) == b""
    assert len(host.peers) == 0
    other = host.call(b"abc\n")
    host.turn(2)
    assert other.recv(9) == b"4"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_listener_is_not_watched_during_a_shortage_until_the_next_round(
    host: Host, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The listener stays readable, so that the loop would turn without a pause."""
    with monkeypatch.context() as short:
        short.setattr(socket.socket, "accept", Mock(side_effect=OSError(number, "a shortage")))
        sock = host.call(b"abc\n")
        for key, _ in host.selector.select(5):
            key.data()
        assert host.selector.select(0) == []
        host.peers.expire()
        for key, _ in host.selector.select(5):
            key.data()
        assert host.selector.select(0) == []
    host.peers.expire()
    host.turn(2)
    assert sock.recv(9) == b"4"


@pytest.mark.timed
def test_a_silent_peer_is_closed_and_delays_no_other_peer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = host.call(b"one byte at a ti")
    host.turn()
    quick, deadline = host.call(b"now\n"), Deadline(line_server.LINE_SECONDS / 2)
    host.turn()
    assert quick.recv(9) == b"4"
    assert not deadline.is_over()
    later(monkeypatch, line_server.LINE_SECONDS)
    host.turn()
    assert slow.recv(9) == b""
    assert len(host.peers) == 0


def test_a_peer_that_does_not_read_its_reply_is_closed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    sock = host.call(b"%d\n" % LONG)
    host.turn(3)
    assert len(host.peers) == 1
    later(monkeypatch, line_server.ANSWER_SECONDS)
    host.turn()
    assert len(host.peers) == 0
    sock.close()


def test_a_long_answer_arrives_completely(host: Host) -> None:
    sock = host.call(b"%d\n" % LONG)
    sock.setblocking(False)
    had, end = 0, time.monotonic() + 20
    while time.monotonic() < end:
        host.turn()
        with contextlib.suppress(BlockingIOError):
            more = sock.recv(1 << 20)
            had += len(more)
            if not more:
                break
    assert had == LONG


def test_a_too_long_line_closes_its_peer_and_an_ended_line_without_newline_is_answered(host: Host) -> None:
    sock = host.call()
    sock.setblocking(False)
    sent, end = 0, time.monotonic() + 20
    while (len(host.peers) or not sent) and time.monotonic() < end:
        with contextlib.suppress(OSError):
            sent += sock.send(b"y" * 4096)
        host.turn()
    assert line_server.MOST_LINE_BYTES < sent <= 8 * line_server.MOST_LINE_BYTES
    ended = host.call(b"half")
    ended.shutdown(socket.SHUT_WR)
    host.turn(2)
    assert ended.recv(9) == b"4"


def test_peers_are_bounded_and_a_peer_that_sends_is_answered(host: Host) -> None:
    silent = [host.call() for _ in range(MOST_PEERS + 40)]
    host.turn(len(silent))
    assert len(host.peers) == MOST_PEERS
    quick = host.call(b"now\n")
    host.turn(2)
    assert quick.recv(9) == b"4"
    for sock in silent:
        sock.close()


def test_closing_the_server_closes_every_peer(host: Host) -> None:
    sock = host.call()
    host.turn()
    host.peers.close()
    assert sock.recv(1) == b""
    assert len(host.selector.get_map()) == 1  # the listener
