"""Connections that the gatekeeper takes from processes that may not connect: what is read, and what is left alone."""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.abi import Hello
from fgpu_ebpf.gatekeeper import knocks
from fgpu_ebpf.gatekeeper.connections import HELLO_BYTES, Connection, Connections
from fgpu_ebpf.gatekeeper.knocks import Knocks
from fgpu_ebpf.gatekeeper.ledger_cache import ManagedState
from fgpu_ebpf.ledger.ring_buffer import Event
from tests.support.wait import eventually

HELLO = bytes(Hello(abi.MAGIC, abi.LAYOUT, HELLO_BYTES))
OTHER = """
import socket, sys
ours = socket.socket(fileno=int(sys.argv[1]))
near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
near.send(bytes.fromhex(sys.argv[2]))
socket.send_fds(ours, [b"."], [far.fileno(), near.fileno()])
sys.stdin.read()
"""


def descriptors() -> set[tuple[str, str]]:
    """Return the open descriptors of this process, with the files. The descriptor of the listing itself is left out."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return found


class Fixture:
    """Connections without a listener. `seen`: the pids of the peers that have sent a hello."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(
            ("malformed", "gone", "silent", "hello_unanswered", "dropped_tenant", "answered"), 0
        )
        self.seen: list[int] = []
        state = ManagedState(False, 7)
        selector = selectors.DefaultSelector()
        self.connections = Connections(selector, self.counts, lambda *_: (1, state), self._look, lambda pid: None)
        self.knocks = Knocks(lambda: None)

    def _look(self, connection: Connection) -> None:
        self.seen.append(connection.pid)
        connection.sock.send(b"answer")
        self.connections.drop(connection, "answered")

    def knock(self, descriptor: int, owner: int = 1, pid: int = 0) -> None:
        """Let a process of a bound owner report a descriptor. Without `pid`, let this process report it."""
        self.knocks.want(Event(0, abi.News.KNOCK, pid or os.getpid(), 0, owner, descriptor, 0, 0))

    def serve(self) -> int:
        """Serve the reports that worker threads have finished. Return their number."""
        self.knocks.go()
        taken = self.knocks.take()
        for found in taken:
            self.connections.enter(*found)
        while self.connections.pending():
            self.connections.serve()
        return len(taken)

    def take(self, descriptor: int) -> None:
        """Take a descriptor of this process, and serve it. No descriptor may be left open, and this one stays open."""
        gc.collect()  # objects of earlier tests close their descriptors
        before = descriptors()
        self.knock(descriptor)
        eventually(self.serve)
        own = {(fd, file) for fd, file in before if fd == str(descriptor)}
        assert own <= descriptors() <= before  # a thread of an earlier test may close another one
        assert len(self.connections) == 0


@pytest.fixture
def fixture() -> Fixture:
    return Fixture()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with contextlib.ExitStack() as stack:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in ends:
            stack.enter_context(end)
            end.setblocking(False)
        yield ends


def test_a_hello_on_a_taken_socket_is_answered_and_the_peer_notices_the_end(
    fixture: Fixture, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    near.send(HELLO)
    fixture.take(far.fileno())
    assert (fixture.seen, fixture.counts["answered"]) == ([os.getpid()], 1)
    assert near.recv(64) == b"answer"
    assert near.recv(64) == b""  # although this process still has the other end


@pytest.mark.parametrize("message", [b"a message of the program", HELLO + b"and more", HELLO[:-1]])
def test_a_message_of_the_program_stays_on_its_socket(
    fixture: Fixture, pair: tuple[socket.socket, socket.socket], message: bytes
) -> None:
    near, far = pair
    near.send(message)
    fixture.take(far.fileno())
    assert (fixture.seen, fixture.counts["malformed"]) == ([], 1)
    assert far.recv(256) == message
    near.send(b"still open")
    assert far.recv(256) == b"still open"


def test_a_socket_without_a_message_is_left_alone(fixture: Fixture, pair: tuple[socket.socket, socket.socket]) -> None:
    fixture.take(pair[1].fileno())
    assert (fixture.seen, fixture.counts["malformed"]) == ([], 1)


def test_a_socket_of_another_kind_is_left_alone(fixture: Fixture) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near, far:
        near.send(HELLO)
        fixture.take(far.fileno())
        assert (fixture.seen, far.recv(256)) == ([], HELLO)


def test_other_files_and_closed_descriptors_are_left_alone(fixture: Fixture) -> None:
    read, write = os.pipe()
    os.write(write, HELLO)
    fixture.take(read)
    assert (fixture.seen, fixture.counts["malformed"], os.read(read, 256)) == ([], 1, HELLO)
    os.close(read)
    os.close(write)
    fixture.take(5000)  # no low number: the gatekeeper's own pidfd may have it, and this process is its own peer here
    fixture.take(0xFFFFFFFF)
    assert (fixture.seen, fixture.counts["gone"]) == ([], 2)


@pytest.mark.parametrize("name", ["file", "socket:[1]"])
def test_no_copy_is_made_of_a_file_that_is_not_a_socket(
    fixture: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The close of a copy is a request to the file's file system, which can block without end."""
    copied: list[int] = []
    copy = knocks.copy_descriptor
    monkeypatch.setattr(knocks, "copy_descriptor", lambda pid, fd: copied.append(fd) or copy(pid, fd))
    with (tmp_path / name).open("wb") as file:
        fixture.take(file.fileno())
    assert (fixture.seen, fixture.counts["malformed"], copied) == ([], 1, [])


def test_a_socket_of_another_process_does_not_speak_for_it(fixture: Fixture) -> None:
    """A process may have been given a socket of a process of another tenant."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", OTHER, str(theirs.fileno()), HELLO.hex()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()]) as other:
            descriptors = socket.recv_fds(ours, 1, 2)[1]
            fixture.take(descriptors[0])
            assert (fixture.seen, fixture.counts["malformed"]) == ([], 1)
            for descriptor in descriptors:
                os.close(descriptor)
            other.communicate()


def test_a_process_that_has_exited_is_gone(fixture: Fixture) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    fixture.knock(3, pid=process.pid)
    eventually(fixture.serve)
    assert fixture.counts["gone"] == 1


def test_a_copy_that_blocks_delays_only_its_own_workload(
    fixture: Fixture, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel copies no descriptor of a process that is in execve() and waits for a file system of its own."""
    near, far = pair
    near.send(HELLO)
    goes_on, copy = threading.Event(), knocks.copy_descriptor
    monkeypatch.setattr(
        knocks, "copy_descriptor", lambda pid, fd: copy(pid, fd) if pid == os.getpid() or goes_on.wait() else -1
    )
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        blocked = stack.enter_context(subprocess.Popen(["sleep", "600"], stdin=theirs))
        stack.callback(blocked.kill)
        stack.callback(goes_on.set)
        for one in (ours, theirs):
            stack.enter_context(one)
        fixture.knock(0, owner=1, pid=blocked.pid)
        fixture.knock(far.fileno(), owner=1)
        fixture.knock(far.fileno(), owner=2)
        eventually(fixture.serve)
        assert (near.recv(64), fixture.counts["answered"], fixture.counts["malformed"]) == (b"answer", 1, 0)
        goes_on.set()
        eventually(
            lambda: fixture.serve() or fixture.counts["malformed"] == 2, what="the reports of the first workload"
        )
