"""Connections to the API server. If the server does not answer, each request ends with an ApiError."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fgpu_ebpf.kubernetes import api_server, resource_slices
from fgpu_ebpf.kubernetes.api_server import ApiError, ApiServer
from fgpu_ebpf.kubernetes.resource_slices import Publisher


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a service account that trusts no server."""
    (tmp_path / "token").write_text("a-token")
    (tmp_path / "ca.crt").write_text("a certificate")
    monkeypatch.setattr(api_server, "_trust", lambda _: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    return tmp_path


async def watch(server: ApiServer) -> None:
    async for _ in server.watch("/watched"):
        pass


async def call(server: ApiServer) -> None:
    await server.call("GET", "/asked")


@pytest.mark.parametrize("text", ["", " ", "a certificate"])
def test_authorities_that_are_not_certificates_are_an_error(tmp_path: Path, text: str) -> None:
    """An empty file would make ssl trust the authorities of the system."""
    (tmp_path / "token").write_text("a-token")
    (tmp_path / "ca.crt").write_text(text)
    with pytest.raises(ApiError, match=r"does not answer: .*(ca.crt is empty|no start line|certificate)"):
        asyncio.run(call(ApiServer("10.0.0.1", 443, tmp_path)))


@pytest.mark.parametrize("request_of", [watch, call])
@pytest.mark.parametrize(
    "failure", [TimeoutError(errno.ETIMEDOUT, "Connection timed out"), OSError(errno.EHOSTUNREACH, "No route to host")]
)
def test_each_failure_to_connect_is_an_api_error(
    account: Path, monkeypatch: pytest.MonkeyPatch, request_of: Any, failure: OSError
) -> None:
    """The kernel reports ETIMEDOUT, which is a TimeoutError, if the server's address drops packets."""

    async def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(asyncio, "open_connection", fail)
    with pytest.raises(ApiError, match=f"the API server 10.0.0.1:443 does not answer: .*{failure.strerror}"):
        asyncio.run(request_of(ApiServer("10.0.0.1", 443, account)))


@pytest.mark.parametrize("request_of", [watch, call])
def test_a_server_that_accepts_and_stays_silent_is_left(
    account: Path, monkeypatch: pytest.MonkeyPatch, request_of: Any
) -> None:
    monkeypatch.setattr(api_server, "REQUEST_SECONDS", 0.3)

    async def run() -> None:
        async with silent() as port, asyncio.timeout(20):
            await request_of(ApiServer("127.0.0.1", port, account))

    with pytest.raises(ApiError, match="answer"):
        asyncio.run(run())


@contextlib.asynccontextmanager
async def silent() -> AsyncIterator[int]:
    """Yield the port of a server that accepts connections and sends nothing."""
    ended = asyncio.Event()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ended.wait()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    ended.set()
    server.close()


def test_the_watch_goes_on_after_each_failure(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0

    async def fail(*_: Any, **__: Any) -> None:
        nonlocal tried
        tried += 1
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(asyncio, "open_connection", fail)
    monkeypatch.setattr(resource_slices, "FIRST_PAUSE_SECONDS", 0.01)

    async def run() -> None:
        publisher = Publisher(ApiServer("10.0.0.1", 443, account), "node")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await publisher.watch()

    asyncio.run(run())
    assert tried > 2


# -- connections


class Plain:
    """A server without TLS that gives each request the next of its answers, and counts connections."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: bytes) -> None:
        self.answers, self.connections, self.open = list(answers), 0, 0
        connect = asyncio.open_connection
        monkeypatch.setattr(asyncio, "open_connection", lambda host, port, ssl, limit: connect(host, port, limit=limit))

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        with contextlib.suppress(EOFError, OSError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                answer = self.answers.pop(0)
                writer.write(answer)
                if b"close" in answer.lower():
                    break
        self.open -= 1
        writer.close()


def answer(text: str, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(text)}", *headers, "", text]).encode()


CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{"a"\r\n3\r\n:1}\r\n0\r\n\r\n'
LAST = answer("{}", "X-Note: then the server will close the connection")  # without an announcement


def asked(account: Path, plain: Plain) -> list[dict[str, Any]]:
    """Request each of the answers, one after another. Return the objects."""

    async def run() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        async with await asyncio.start_server(plain, "127.0.0.1", 0) as listener, asyncio.timeout(20):
            server = ApiServer("127.0.0.1", listener.sockets[0].getsockname()[1], account)
            while plain.answers:
                found.append(await server.call("GET", "/asked"))
            until = asyncio.get_running_loop().time() + 5
            while plain.open and asyncio.get_running_loop().time() < until:
                await asyncio.sleep(0.01)
        return found

    return asyncio.run(run())


def test_requests_share_a_connection_until_it_is_idle(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_server, "IDLE_SECONDS", 0.2)
    plain = Plain(monkeypatch, CHUNKED, answer('{"b":2}'), CHUNKED)
    assert asked(account, plain) == [{"a": 1}, {"b": 2}, {"a": 1}]
    assert (plain.connections, plain.open) == (1, 0)


@pytest.mark.parametrize("last", [LAST, answer("{}", "Connection: close"), b"HTTP/1.1 200 OK\r\nX: close\r\n\r\n{}"])
def test_a_closed_connection_is_replaced(account: Path, monkeypatch: pytest.MonkeyPatch, last: bytes) -> None:
    plain = Plain(monkeypatch, last, last, answer('{"b":2}'))
    assert asked(account, plain) == [{}, {}, {"b": 2}]
    assert plain.connections == 3
