"""Malformed messages to the gatekeeper's socket affect only their sender."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct

import pytest

from tests.e2e.hello_kit import GOOD, LAYOUT, MAGIC, SIZE, SOCKET
from tests.support.commands import ask
from tests.support.host import CONTEXT, MIB
from tests.support.service import Service
from tests.support.wait import eventually

BAD = [
    b"",
    b"\0",
    GOOD[:-1],
    GOOD + b"\0",
    GOOD * 1000,
    bytes(SIZE),
    b"\xff" * SIZE,
    struct.pack("<IHH", MAGIC, 99, SIZE).ljust(SIZE, b"\0"),
    struct.pack("<IHH", MAGIC, LAYOUT, SIZE - 1).ljust(SIZE, b"\0"),
    struct.pack("<IHH", MAGIC ^ 1, LAYOUT, SIZE).ljust(SIZE, b"\0"),
]


def speak(message: bytes, seconds: float = 20) -> bytes:
    """Send one message. Return the data that arrives before the peer closes the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(seconds)
        sock.connect(SOCKET)
        with contextlib.suppress(BrokenPipeError):
            sock.send(message)
        with contextlib.suppress(ConnectionResetError):
            return sock.recv(4096)
    return b""


def counted(name: str) -> int:
    """Return a counter of the gatekeeper, which saves its counters once a second."""
    return int(ask(verb="snapshot")["gatekeeper"].get(name, 0))


@pytest.mark.places("host")
def test_a_malformed_message_disconnects_only_its_sender(service: Service, tenant, scale) -> None:
    one = tenant(CONTEXT + 40 * MIB)
    client = one.client()
    client.ok("context")
    client.send(f"ask {2 * MIB} 0")
    before, keepers = counted("malformed"), service.gatekeepers()
    chance = random.Random(23)
    messages = BAD + [chance.randbytes(chance.randrange(200)) for _ in range(scale(50, 500, 10_000))]
    messages += [bytes(b ^ (chance.random() < 0.02) << chance.randrange(8) for b in GOOD[:8]) + GOOD[8:] for _ in BAD]
    for message in messages:
        if message[:8] != GOOD[:8] or len(message) != SIZE:
            assert speak(message) == b"", message
    eventually(lambda: counted("malformed") - before >= len(BAD) - 1, 3, "the count of malformed messages")
    client.send("context")
    got, refused, other = client.numbers(client.receive())
    assert got > 0
    assert (refused, other) == (0, 0)
    assert client.receive() == "ok"
    assert service.gatekeepers() == keepers
    with one.growing(20 * MIB):
        client.ok(f"alloc {20 * MIB}")


@pytest.mark.places("host")
def test_the_gatekeeper_closes_descriptors_that_a_client_sends(service: Service, tenant) -> None:
    (keeper,) = service.gatekeepers()
    before = len(os.listdir(f"/proc/{keeper}/fd"))
    for _ in range(50):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(SOCKET)
            socket.send_fds(sock, [bytes(SIZE)], [0, 1, 2])
    eventually(lambda: len(os.listdir(f"/proc/{keeper}/fd")) <= before, 5, "the close of the received descriptors")
    with tenant(CONTEXT + 40 * MIB).growing():
        pass


@pytest.mark.places("host")
def test_silent_connections_do_not_delay_other_clients(service: Service, tenant) -> None:
    peers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(200)]
    try:
        for peer in peers:
            peer.settimeout(1)
            with contextlib.suppress(OSError):
                peer.connect(SOCKET)
        one = tenant(CONTEXT + 40 * MIB)
        client = one.client()
        with one.growing(40 * MIB):
            client.ok("context", 20)
            client.ok(f"alloc {40 * MIB}")
    finally:
        for peer in peers:
            peer.close()


@pytest.mark.slow
def test_an_unmanaged_process_gets_an_answer_without_usage_pages(service: Service) -> None:
    """The process is outside every tenant, and is the first to register after the start. It is answered at once."""
    service.detach()
    service.start_agent()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(5)
        sock.connect(SOCKET)
        sock.send(GOOD)
        answer, fds, _, _ = socket.recv_fds(sock, 4096, 16)
    for fd in fds:
        os.close(fd)
    assert len(answer) == 128, "no answer"
    magic, _, size, code, levels = struct.unpack_from("<IHHII", answer)
    assert (magic, size) == (MAGIC, 128)
    assert code != 1  # the code for managed processes
    assert levels == 0
    assert len(fds) <= 2
