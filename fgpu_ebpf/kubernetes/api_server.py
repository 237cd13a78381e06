"""A client of Kubernetes' API server, with the service account of the pod.

This module runs in the asyncio loop of the DRA driver. A connection serves one request at a time, and is closed if no
request follows within a few seconds: a TLS handshake takes longer than a request, and an old connection may lead to a
server that no longer exists. The token is read for each request, because kubelet replaces the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REQUEST_SECONDS = 10.0
WATCH_SECONDS = 300  # the server ends a watch after this time
IDLE_SECONDS = 5.0  # after which a connection without a request is closed
MOST_BYTES = 4 << 20  # of an answer
JSON = "application/json"
APPLY = "application/apply-patch+yaml"  # of a PATCH that sets fields as their owner; JSON is YAML
_MOST_HEADERS = 1 << 16


class ApiError(Exception):
    """A request failed. `status`: the server's code, or 0 if the server did not respond. The text has the reason."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True)
class ApiServer:
    """The address of the server, and the folder with the service account's `token` and `ca.crt`."""

    host: str
    port: int
    folder: Path = FOLDER
    _idle: list[_Connection] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def of_pod(cls, folder: Path = FOLDER) -> ApiServer:
        """Return the server of the pod in which this process runs. Raise ApiError outside of a pod."""
        try:
            return cls(os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]), folder)
        except (KeyError, ValueError) as error:
            raise ApiError(0, "KUBERNETES_SERVICE_HOST and _PORT are not set: run this process in a pod") from error

    async def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, kind: str = JSON
    ) -> dict[str, Any]:
        """Send a request and return the object of the answer. `kind`: the media type of `body`.

        Raise ApiError on failure.
        """
        try:
            async with asyncio.timeout(REQUEST_SECONDS), self._answer(method, path, body, kind) as (status, chunks):
                data = bytearray()
                async for chunk in chunks:
                    data += chunk
                    if len(data) > MOST_BYTES:
                        raise ApiError(status, f"the answer of the API server has more than {MOST_BYTES} bytes")
        except TimeoutError as error:
            raise ApiError(0, f"the API server has not answered for {REQUEST_SECONDS:.0f} s") from error
        return _read(status, bytes(data))

    async def watch(self, path: str) -> AsyncIterator[None]:
        """Yield once for each event of a watch, until the server ends the watch. Raise ApiError on failure."""
        separator = "&" if "?" in path else "?"
        watched = f"{path}{separator}watch=1&timeoutSeconds={WATCH_SECONDS}"
        async with self._answer("GET", watched) as (status, chunks):
            if status != 200:
                raise ApiError(status, f"the API server refuses a watch with {status}")
            while True:
                try:
                    async with asyncio.timeout(WATCH_SECONDS + REQUEST_SECONDS):
                        chunk = await anext(chunks, None)
                except TimeoutError as error:
                    raise ApiError(0, "the API server does not end a watch") from error
                if chunk is None:
                    return
                yield  # an event may arrive in several chunks, but the caller reads the object in any case

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, kind: str = JSON
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Send a request. Yield the status, and the chunks of the answer's body.

        The caller reads the whole body, or raises an exception. After a whole body, the connection may serve another
        request.
        """
        connection = None
        try:
            token = (self.folder / "token").read_text().strip()
            trust = _trust((self.folder / "ca.crt").read_text(encoding="ascii", errors="ignore"))
            data = json.dumps(body).encode() if body is not None else b""
            authority = f"[{self.host}]" if ":" in self.host else self.host
            lines = [
                f"{method} {path} HTTP/1.1", f"Host: {authority}:{self.port}", f"Authorization: Bearer {token}",
                f"Accept: {JSON}", f"Content-Type: {kind}", f"Content-Length: {len(data)}",
                "User-Agent: fgpu",
            ]  # fmt: skip
            async with asyncio.timeout(REQUEST_SECONDS):
                connection, text = await self._send("\r\n".join([*lines, "", ""]).encode() + data, trust)
            head = text.decode("latin-1").split("\r\n")
            headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in head)}
            yield int(head[0].split()[1]), _chunks(connection.reader, headers)
            if _has_end(headers):
                self._keep(connection)
                connection = None
        except (OSError, EOFError, ValueError, IndexError, asyncio.LimitOverrunError) as error:  # OSError: or a timeout
            reason = str(error) or f"no bytes for {REQUEST_SECONDS:.0f} s"
            raise ApiError(0, f"the API server {self.host}:{self.port} does not answer: {reason}") from error
        finally:
            if connection:
                connection.close()

    async def _send(self, request: bytes, trust: ssl.SSLContext) -> tuple[_Connection, bytes]:
        """Send a request on an idle or a new connection. Return the connection and the head of the answer.

        A request is repeated if the server closes an idle connection. Each request of this package can be repeated.
        """
        while self._idle:
            connection = self._idle.pop()
            connection.timer.cancel()
            with contextlib.suppress(OSError, EOFError):
                return connection, await connection.send(request)
        connection = _Connection(*await asyncio.open_connection(self.host, self.port, ssl=trust, limit=_MOST_HEADERS))
        return connection, await connection.send(request)

    def _keep(self, connection: _Connection) -> None:
        self._idle.append(connection)
        connection.timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._expire, connection)

    def _expire(self, connection: _Connection) -> None:
        self._idle.remove(connection)
        connection.close()


class _Connection:
    """An open connection. `timer`: closes the connection while it is idle."""

    timer: asyncio.TimerHandle

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self._writer = reader, writer

    async def send(self, request: bytes) -> bytes:
        """Send a request, and return the head of the answer. After an error the connection is closed."""
        try:
            self._writer.write(request)
            return await self.reader.readuntil(b"\r\n\r\n")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, without waiting for the server."""
        self._writer.transport.abort()


def _has_end(headers: Mapping[str, str]) -> bool:
    """Return whether another answer can follow an answer on the connection."""
    has_length = headers.get("transfer-encoding", "").lower() == "chunked" or "content-length" in headers
    return has_length and headers.get("connection", "").lower() != "close"


@lru_cache(maxsize=1)
def _trust(authorities: str) -> ssl.SSLContext:
    """Return TLS settings that trust these certificates. Raise ssl.SSLError or ValueError on failure."""
    if not authorities:  # ssl would trust the authorities of the system
        raise ValueError("ca.crt is empty")
    return ssl.create_default_context(cadata=authorities)


async def _chunks(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """Yield the parts of an answer's body as they arrive. Raise EOFError or ValueError if the body is incomplete."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            if size > MOST_BYTES:
                raise ValueError(f"a part of the answer has {size} bytes, more than {MOST_BYTES}")
            yield (await reader.readexactly(size + 2))[:-2]
        while (await reader.readline()).strip():  # trailers, and the empty line after them
            pass
    elif "content-length" in headers:
        yield await reader.readexactly(min(int(headers["content-length"]), MOST_BYTES + 1))
    else:
        while data := await reader.read(1 << 16):
            yield data


def _read(status: int, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if 200 <= status < 300 and isinstance(found, dict):
        return found
    said = found.get("message") if isinstance(found, dict) else None
    raise ApiError(status, f"the API server answers {status}: {str(said or 'no object')[:500]}")
