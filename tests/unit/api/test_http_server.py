"""Tests of the HTTP server: it serves eight requests at a time, and incomplete requests do not exclude others."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from fgpu_ebpf.api import http_server
from fgpu_ebpf.api.http_server import HEAD_SECONDS, MOST_CLIENTS, MOST_WAITING, HttpServer, by_path, health
from tests.support.wait import Deadline, eventually


def app(_: dict[str, Any], start: Any) -> Iterable[bytes]:
    start("200 OK", [("Content-Type", "text/plain")])
    return [b"fine"]


@contextlib.contextmanager
def serving(one: HttpServer) -> Iterator[HttpServer]:
    """Serve requests in a thread, as the agent's loop does."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(0.01):
            one.handle_request()
            one.expire()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield one
    finally:
        ended.set()
        thread.join()
        one.server_close()


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a client without a processor send its request long after its connection."""
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 30.0)


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with serving(HttpServer("127.0.0.1", 0, app)) as one:
        yield one


def test_a_request_that_gets_no_thread_is_closed_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one = HttpServer("127.0.0.1", 0, app)
    with socket.create_connection(one.server_address[:2], timeout=10) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
            with pytest.raises(RuntimeError, match="new thread"):
                eventually(lambda: one.handle_request() or one.heads, 10, "the request")
        assert not one.heads
        assert not one._in_threads
        assert client.recv(1) == b""
        one.server_close()


def test_an_address_that_cannot_be_watched_does_not_stay_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    refused = Mock(side_effect=OSError(errno.ENOMEM, "epoll_ctl"))
    with monkeypatch.context() as short:
        short.setattr(selectors.EpollSelector, "register", refused)
        with pytest.raises(OSError, match="epoll_ctl") as found:
            HttpServer("127.0.0.1", port, app)
    HttpServer("127.0.0.1", port, app).server_close()
    assert found.value.errno == errno.ENOMEM


def test_the_address_is_not_watched_during_a_shortage_until_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket stays readable, so that the agent's loop would turn without a pause."""
    one, selector = HttpServer("127.0.0.1", 0, app), selectors.DefaultSelector()
    selector.register(one, selectors.EVENT_READ)
    with socket.create_connection(one.server_address[:2], timeout=10) as client:
        with monkeypatch.context() as short:
            short.setattr(socket.socket, "accept", Mock(side_effect=OSError(errno.EMFILE, "too many open files")))
            assert selector.select(10)
            assert not one.receive()
            assert selector.select(0) == []
        one.expire()
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        eventually(lambda: selector.select(10) and one.receive(), 10, "the request")
        one.answer()
        assert client.recv(12) == b"HTTP/1.0 200"
        selector.close()
        one.server_close()


def ask(server: HttpServer) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=20) as answer:
        return bytes(answer.read())


def silent(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=20)


def test_the_server_answers_a_request(server: HttpServer) -> None:
    assert ask(server) == b"fine"


def test_silent_connections_have_no_thread_and_are_closed(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())  # threads of earlier tests may end at any time
    socks = [silent(server) for _ in range(3 * MOST_WAITING)]
    time.sleep(0.2)
    assert set(threading.enumerate()) <= before
    assert ask(server) == b"fine"
    for sock in socks:
        sock.close()
    eventually(lambda: not server._waiting)
    monkeypatch.setattr(http_server, "HEAD_SECONDS", HEAD_SECONDS)
    socks = [silent(server) for _ in range(MOST_WAITING)]
    assert [sock.recv(1) for sock in socks] == [b""] * MOST_WAITING
    eventually(lambda: not server._waiting)
    for sock in socks:
        sock.close()


def test_slow_connections_prevent_no_request(server: HttpServer) -> None:
    """More connections than may wait send single bytes, and are replaced as soon as the server closes them.

    None is replaced between a client's connection and its request, which a slow machine may separate by any time.
    """
    ended, replaced = threading.Event(), threading.Lock()

    def answer() -> bytes:
        with replaced:
            sock = silent(server)
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with sock, contextlib.suppress(OSError):
            return sock.makefile("rb").read()[-4:]
        return b""

    def drip() -> None:
        with replaced:
            socks = [silent(server) for _ in range(MOST_WAITING // 4)]
        while not ended.wait(0.01):
            for number, sock in enumerate(socks):
                try:
                    sock.sendall(b"G")
                except OSError:
                    sock.close()
                    with replaced:
                        socks[number] = silent(server)
        for sock in socks:
            sock.close()

    drippers = [threading.Thread(target=drip) for _ in range(6)]
    for dripper in drippers:
        dripper.start()
    try:
        time.sleep(0.2)
        assert [answer() for _ in range(50)] == [b"fine"] * 50
    finally:
        ended.set()
        for dripper in drippers:
            dripper.join()


def test_requests_beyond_eight_wait_for_a_thread() -> None:
    go, running, most, lock = threading.Event(), 0, 0, threading.Lock()

    def slow(_: dict[str, Any], start: Any) -> Iterable[bytes]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        go.wait(20)
        with lock:
            running -= 1
        start("200 OK", [("Content-Type", "text/plain")])
        return [b"fine"]

    with serving(HttpServer("127.0.0.1", 0, slow)) as server:
        socks = [silent(server) for _ in range(3 * MOST_CLIENTS)]
        for sock in socks:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        eventually(lambda: len(server._in_threads) + len(server._waiting) == len(socks) and running >= MOST_CLIENTS)
        go.set()
        assert all(sock.makefile("rb").read().endswith(b"fine") for sock in socks)
        for sock in socks:
            sock.close()
    assert most == MOST_CLIENTS


def test_clients_that_do_not_read_their_replies_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SLOW_SECONDS", 0.3)

    def large(_: dict[str, Any], start: Any) -> Iterable[bytes]:
        start("200 OK", [("Content-Type", "text/plain")])
        return [b"x" * (64 << 20)]

    with serving(HttpServer("127.0.0.1", 0, large)) as server:
        socks = [silent(server) for _ in range(MOST_CLIENTS)]
        for sock in socks:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        time.sleep(0.2)
        assert len(ask(server)) == 64 << 20
        for sock in socks:
            sock.close()


@pytest.mark.parametrize("head", [b"G" * (1 << 20), b"\0" * 100_000, b"GET / HTTP/1.0\r\nX: " + b"y" * (1 << 20)])
def test_an_endless_request_head_closes_the_connection(server: HttpServer, head: bytes) -> None:
    with silent(server) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(head)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1 << 16) == b""
    assert ask(server) == b"fine"


def test_a_slow_connection_is_closed(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_SECONDS", HEAD_SECONDS)

    def drip() -> None:
        deadline = Deadline(4)
        while not deadline.is_over():
            sock.sendall(b"G")
            time.sleep(0.1)

    with silent(server) as sock, pytest.raises((BrokenPipeError, ConnectionResetError)):
        drip()


def test_an_address_in_use_is_reported_and_each_attempt_closes_its_descriptors(server: HttpServer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="in use"):
            HttpServer("127.0.0.1", server.server_port, app)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_host_name_is_refused_without_asking_a_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    flags, resolve = [], socket.getaddrinfo

    def recorded(*words: Any, **names: Any) -> Any:
        flags.append(names["flags"])
        return resolve(*words, **names)

    monkeypatch.setattr(http_server.socket, "getaddrinfo", recorded)
    with pytest.raises(socket.gaierror):
        HttpServer("gpu1.example", 0, app)
    one = HttpServer("localhost", 0, app)
    assert one.server_address[0] == "127.0.0.1"
    one.server_close()
    assert all(each & socket.AI_NUMERICHOST for each in flags)


def test_the_server_supports_an_ipv6_address() -> None:
    one = HttpServer("::1", 0, app)
    assert one.address_family == socket.AF_INET6
    one.server_close()


def status_of(method: str, path: str, fault: str = "") -> tuple[str, bytes]:
    said: list[str] = []
    answer = by_path({"/": app, "/metrics": app, "/readyz": health(lambda: fault)})
    body = b"".join(answer({"REQUEST_METHOD": method, "PATH_INFO": path}, lambda status, _: said.append(status)))  # type: ignore[arg-type, return-value]
    return said[0], body


def test_requests_are_routed_by_path() -> None:
    assert status_of("GET", "/metrics") == status_of("GET", "/") == status_of("GET", "") == ("200 OK", b"fine")
    assert status_of("GET", "/x") == ("404 Not Found", b"no such path; valid paths: / /metrics /readyz\n")
    assert status_of("HEAD", "/metrics/") == ("404 Not Found", b"")


def test_readyz_reports_the_fault() -> None:
    assert status_of("GET", "/readyz") == ("200 OK", b"ok\n")
    assert status_of("GET", "/readyz", "no driver: \u2026") == (
        "503 Service Unavailable",
        "no driver: \u2026\n".encode(),
    )
    assert status_of("HEAD", "/readyz", "no driver") == ("503 Service Unavailable", b"")


def status(server: HttpServer, host: str | None) -> int:
    said = "" if host is None else f"Host: {host}\r\n"
    with socket.create_connection(server.server_address[:2], timeout=20) as sock:
        sock.sendall(f"GET / HTTP/1.0\r\n{said}\r\n".encode())
        return int(sock.makefile("rb").readline().split()[1])


OWN = ["localhost", "LocalHost:9423", "127.0.0.1", "127.0.0.1:9423", "[::1]:9423", "[::1]", "10.1.2.3:9423", None]
STRANGE = [
    "evil.example",
    "evil.example:9423",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "[evil]:1",
    "",
    "a,b",
]


@pytest.mark.parametrize(
    ("address", "names", "answered", "refused"),
    [
        ("127.0.0.1", (), OWN, STRANGE),
        ("127.0.0.1", ("Gpu1.example",), [*OWN, "gpu1.example:80", "GPU1.example."], STRANGE),
        ("0.0.0.0", (), [*OWN, *STRANGE], []),
        ("", ("gpu1.example",), [*OWN, "gpu1.example"], STRANGE),
    ],
)
def test_a_server_on_loopback_or_with_names_accepts_only_its_own_host_names(
    address: str, names: tuple[str, ...], answered: list[str | None], refused: list[str]
) -> None:
    with serving(HttpServer(address, 0, app, names)) as server:
        assert {host: status(server, host) for host in answered} == dict.fromkeys(answered, 200)
        assert {host: status(server, host) for host in refused} == dict.fromkeys(refused, 421)
