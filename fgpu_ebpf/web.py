"""The metrics address: HTTP. The agent's main loop reads connections until a whole request is there; then a thread, one
of eight at most, answers it.

Owns: the listening socket, the connections and these threads. Never: waits for a connection, or gives a thread to one
that has sent no whole request: others' requests would have to wait for it. On failure: OSError, where the address is
taken.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import selectors
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from fgpu_ebpf.bell import Bell

MOST_CLIENTS = 8  # requests that are answered at a time
MOST_WAITING = 64  # connections besides, with a whole request or without
MOST_HEAD_BYTES = 16 << 10
HEAD_SECONDS = 1.0  # for the whole head of a request
SLOW_SECONDS = 1.0  # after which a client that takes its answer slowly makes room for another request
CLIENT_SECONDS = 10.0
AT_ONCE = 16


def by_path(apps: Mapping[str, WSGIApplication]) -> WSGIApplication:
    """Each path has its own; any other is answered with 404 and the paths that there are."""
    missing = _said("404 Not Found", f"no such path: {' '.join(apps)}")

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        return apps.get(environ.get("PATH_INFO") or "/", missing)(environ, start)

    return answer


def called(names: Collection[str], app: WSGIApplication) -> WSGIApplication:
    """Whoever asks for the host by another name than these, localhost or an address is answered with 421.

    Any page in a browser of this host may have its own name mean 127.0.0.1, and would read what is there.
    """
    known = {"localhost", *(name.lower().rstrip(".") for name in names)}
    refused = _said("421 Misdirected Request", "ask by address, as localhost, or by a name that listenNames has")

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        host = _host(environ.get("HTTP_HOST", "localhost"))  # a browser always says it
        return (app if host in known or _is_address(host) else refused)(environ, start)

    return answer


def _host(said: str) -> str:
    """Without the port."""
    host, colon, port = said.rpartition(":")
    return (host if colon and not port.endswith("]") else said).lower().rstrip(".")


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False


def health(fault: Callable[[], str]) -> WSGIApplication:
    """200 and "ok", or 503 and what is wrong."""

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        wrong = fault()
        said = _said("503 Service Unavailable", wrong) if wrong else _said("200 OK", "ok")
        return said(environ, start)

    return answer


def _said(status: str, text: str) -> WSGIApplication:
    body = f"{text}\n".encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")]

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        start(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


@dataclass(eq=False, slots=True)
class _Waiting:
    """A connection that no thread has yet. `head`: what it has sent so far."""

    sock: socket.socket
    address: Any
    until: float
    head: bytearray = field(default_factory=bytearray)

    @property
    def is_whole(self) -> bool:
        """True once the request's head is complete; bodies are for no path of ours."""
        return b"\r\n\r\n" in self.head or b"\n\n" in self.head


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_SECONDS / 2  # of silence

    def setup(self) -> None:
        """Reads the head that the main loop has received; the socket is for the answer alone."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(io.BytesIO(self.server.heads.pop(self.request)))  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        """Requests are no news."""


class Web(ThreadingMixIn, WSGIServer):
    """Serves `app` at host:port. Readable when there is something to do: hear(), then answer(); expire() now and then.

    `names`: what it may be asked for by; none: any name, or where no other host reaches it, localhost alone.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # where it is full, the kernel lets a client try again after a second

    def __init__(self, host: str, port: int, app: WSGIApplication, names: Collection[str] = ()) -> None:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self.address_family = family
        self._waiting: dict[_Waiting, None] = {}  # oldest first
        self._here: dict[Any, float] = {}  # those that a thread answers, since when; oldest first
        self.heads: dict[Any, bytes] = {}
        self._ended = Bell()  # a thread has ended: another request may have its place
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type]
        is_ours_alone = ipaddress.ip_address(address[0]).is_loopback
        self.set_app(called(names, app) if names or is_ours_alone else app)
        self.socket.setblocking(False)  # a client that has hung up meanwhile must not be waited for
        self._selector = selectors.EpollSelector()
        self._selector.register(self.socket, selectors.EVENT_READ, self._accept)
        self._selector.register(self._ended, selectors.EVENT_READ, self._ended.hush)

    def server_bind(self) -> None:
        """Without the name that the library would look up, and wait for."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def fileno(self) -> int:
        """Readable when hear() has something to do."""
        return self._selector.fileno()

    # -- requests that come

    def hear(self) -> bool:
        """Take in connections and what they have sent. True: a whole request waits for answer()."""
        for key, _ in self._selector.select(0):
            key.data()
        return any(waiting.is_whole for waiting in self._waiting)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(AT_ONCE):
                sock, address = self.socket.accept()
                sock.setblocking(False)
                if len(self._waiting) >= MOST_WAITING and not self._evict():
                    sock.close()
                    continue
                waiting = _Waiting(sock, address, time.monotonic() + HEAD_SECONDS)
                self._waiting[waiting] = None
                self._selector.register(sock, selectors.EVENT_READ, lambda waiting=waiting: self._receive(waiting))
                self._receive(waiting)  # most have sent it all by now

    def _evict(self) -> bool:
        """Hang up on the oldest connection without a whole request. False: each has sent one."""
        slowest = next((waiting for waiting in self._waiting if not waiting.is_whole), None)
        if slowest:
            self._drop(slowest)
        return slowest is not None

    def _receive(self, waiting: _Waiting) -> None:
        if waiting not in self._waiting:
            return  # hung up on since the selector told of it
        try:
            more = waiting.sock.recv(MOST_HEAD_BYTES)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        waiting.head += more
        if waiting.is_whole:
            waiting.until = time.monotonic() + CLIENT_SECONDS
            self._selector.unregister(waiting.sock)
        elif not more or len(waiting.head) > MOST_HEAD_BYTES:
            self._drop(waiting)

    def _drop(self, waiting: _Waiting) -> None:
        del self._waiting[waiting]
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(waiting.sock)
        waiting.sock.close()

    # -- their answers

    def handle_request(self) -> None:
        """Hear, and answer."""
        if self.hear():
            self.answer()

    def answer(self) -> None:
        """Start threads for whole requests, as long as there are places."""
        for waiting in [waiting for waiting in self._waiting if waiting.is_whole]:
            if len(self._here) >= MOST_CLIENTS:
                self._end_slow()
                return
            del self._waiting[waiting]
            waiting.sock.setblocking(True)
            self.heads[waiting.sock] = bytes(waiting.head)
            self.process_request(waiting.sock, waiting.address)

    def _end_slow(self) -> None:
        """Another request waits: hang up on the oldest client that takes its answer slowly."""
        since = time.monotonic() - SLOW_SECONDS
        slow = next((request for request, begun in list(self._here.items()) if begun < since), None)
        if slow is not None:
            self._hang_up(slow)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own."""
        self._here[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """It has its answer, or none."""
        self._here.pop(request, None)
        self.heads.pop(request, None)
        super().shutdown_request(request)
        self._ended.ring()

    def expire(self) -> None:
        """Hang up on connections that have had their time, and let waiting requests have their places."""
        now = time.monotonic()
        for waiting in [waiting for waiting in self._waiting if waiting.until < now]:
            self._drop(waiting)
        for request in [request for request, begun in list(self._here.items()) if begun + CLIENT_SECONDS < now]:
            self._hang_up(request)
        self.answer()

    def _hang_up(self, request: Any) -> None:
        try:
            request.shutdown(socket.SHUT_RDWR)  # its thread wakes, and ends
        except OSError:
            self._here.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""
