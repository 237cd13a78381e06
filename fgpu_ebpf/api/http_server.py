"""The HTTP server of the metrics address.

The agent's main loop receives requests. When a request is complete, one of at most MOST_CLIENTS threads writes the
response. A connection without a complete request gets no thread, because other requests would wait for the thread.
HttpServer raises OSError if the address is in use.
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

from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.wakeup import Wakeup

MOST_CLIENTS = 8  # requests that are answered at the same time
MOST_WAITING = 64  # further connections, with or without a complete request
MOST_HEAD_BYTES = 16 << 10
HEAD_SECONDS = 1.0  # the longest time for the whole head of a request
SLOW_SECONDS = 1.0  # after this time, the connection of a slow reader is closed if another request waits for a thread
CLIENT_SECONDS = 10.0  # the longest wait of a complete request for a thread, and the longest time for its response
AT_ONCE = 16  # connections to accept before the main loop continues


def by_path(apps: Mapping[str, WSGIApplication]) -> WSGIApplication:
    """Return an application that calls the application in `apps` for the request's path. Other paths get 404.

    The text of the 404 response lists the valid paths.
    """
    missing = _text_response("404 Not Found", f"no such path; valid paths: {' '.join(apps)}")

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        return apps.get(environ.get("PATH_INFO") or "/", missing)(environ, start)

    return answer


def only_by_name(names: Collection[str], app: WSGIApplication) -> WSGIApplication:
    """Return an application that calls `app`, or replies 421 if Host is not in `names`, localhost or an IP address.

    The check prevents DNS rebinding. Without the check, a web page in a browser on this host could let its own host
    name resolve to 127.0.0.1 and read the metrics.
    """
    known = {"localhost", *(name.lower().rstrip(".") for name in names)}
    text = "host name not accepted: use an address, localhost, or a name in listenNames of agent.yaml"
    refused = _text_response("421 Misdirected Request", text)

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        host = _host(environ.get("HTTP_HOST", "localhost"))  # a browser always sends the header
        return (app if host in known or _is_address(host) else refused)(environ, start)

    return answer


def _host(header: str) -> str:
    """Return the Host header without the port."""
    host, colon, port = header.rpartition(":")
    return (host if colon and not port.endswith("]") else header).lower().rstrip(".")


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False


def health(error: Callable[[], str]) -> WSGIApplication:
    """Return an application that replies 200 "ok", or 503 with the text that `error` returns."""

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        wrong = error()
        reply = _text_response("503 Service Unavailable", wrong) if wrong else _text_response("200 OK", "ok")
        return reply(environ, start)

    return answer


def _text_response(status: str, text: str) -> WSGIApplication:
    body = f"{text}\n".encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")]

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        start(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


@dataclass(eq=False, slots=True)
class _Waiting:
    """A connection without a thread. `until`: the monotonic time of its timeout. `head`: the bytes received so far."""

    sock: socket.socket
    address: Any
    until: float
    head: bytearray = field(default_factory=bytearray)

    @property
    def is_whole(self) -> bool:
        """True once the request's head is complete. No path reads a request's body."""
        return b"\r\n\r\n" in self.head or b"\n\n" in self.head


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_SECONDS / 2  # the timeout of one write to the socket

    def setup(self) -> None:
        """Pass the head that the main loop has received to the handler. The socket is used for the response alone."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(io.BytesIO(self.server.heads.pop(self.request)))  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        """Do not log requests."""


class HttpServer(ThreadingMixIn, WSGIServer):
    """The server of `app` at host:port. The descriptor is readable when receive() has work to do.

    After receive() has returned True, answer() starts the threads. The caller calls expire() regularly.

    Args:
        host: an address, `localhost`, or empty for all addresses. A name is refused, because its resolution can take
            minutes.
        names: accepted names of the host. If empty, any name is accepted, or only localhost if the address is a
            loopback address.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # if the queue is full, the client's kernel tries to connect again after a second

    def __init__(self, host: str, port: int, app: WSGIApplication, names: Collection[str] = ()) -> None:
        numeric = "127.0.0.1" if host == "localhost" else host or None
        flags = socket.AI_PASSIVE | socket.AI_NUMERICHOST
        family, _, _, _, address = socket.getaddrinfo(numeric, port, type=socket.SOCK_STREAM, flags=flags)[0]
        self.address_family = family
        self._waiting: dict[_Waiting, None] = {}  # oldest first
        self._in_threads: dict[Any, float] = {}  # by request, oldest first: the start of the thread's answer
        self.heads: dict[Any, bytes] = {}
        self._selector = selectors.EpollSelector()  # the base class may call server_close()
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type]
        self._ended = Wakeup()  # wakes the loop when a thread has ended, so that another request gets a thread
        is_loopback = ipaddress.ip_address(address[0]).is_loopback
        self.set_app(only_by_name(names, app) if names or is_loopback else app)
        self.socket.setblocking(False)  # accept() must not wait if the client has already closed the connection
        try:
            self._selector.register(self.socket, selectors.EVENT_READ, self._accept)
            self._selector.register(self._ended, selectors.EVENT_READ, self._ended.clear)
        except OSError:
            self.discard()  # otherwise the address stays in use
            raise

    def server_bind(self) -> None:
        """Bind like the base class, but without the base class's reverse lookup of the host name, which can block."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def server_close(self) -> None:
        """Stop listening."""
        super().server_close()
        self._selector.close()

    def discard(self) -> None:
        """Stop listening, and close all descriptors. receive() must not have been called."""
        self.server_close()
        self._ended.close()

    def fileno(self) -> int:
        """Return a descriptor that is readable when receive() has work to do."""
        return self._selector.fileno()

    # -- incoming requests

    def receive(self) -> bool:
        """Accept connections and read the received bytes. Return True if a complete request waits for answer()."""
        for key, _ in self._selector.select(0):
            key.data()
        return any(waiting.is_whole for waiting in self._waiting)

    def _accept(self) -> None:
        try:
            for _ in range(AT_ONCE):
                sock, address = self.socket.accept()
                sock.setblocking(False)
                if len(self._waiting) >= MOST_WAITING and not self._evict():
                    sock.close()
                    continue
                waiting = _Waiting(sock, address, time.monotonic() + HEAD_SECONDS)
                self._waiting[waiting] = None
                self._selector.register(sock, selectors.EVENT_READ, lambda waiting=waiting: self._receive(waiting))
                self._receive(waiting)  # most clients have sent the whole request by now
        except BlockingIOError:  # no other connection waits
            pass
        except OSError as error:
            if error.errno in procfs.SHORTAGES:  # the socket stays readable: do not watch it until expire()
                self._selector.unregister(self.socket)

    def _evict(self) -> bool:
        """Close the oldest connection without a complete request. Return False if every request is complete."""
        slowest = next((waiting for waiting in self._waiting if not waiting.is_whole), None)
        if slowest:
            self._drop(slowest)
        return slowest is not None

    def _receive(self, waiting: _Waiting) -> None:
        if waiting not in self._waiting:
            return  # closed since the selector reported it
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

    # -- responses

    def handle_request(self) -> None:
        """Receive, and answer complete requests."""
        if self.receive():
            self.answer()

    def answer(self) -> None:
        """Start a thread for each complete request, up to MOST_CLIENTS."""
        for waiting in [waiting for waiting in self._waiting if waiting.is_whole]:
            if len(self._in_threads) >= MOST_CLIENTS:
                self._end_slow()
                return
            del self._waiting[waiting]
            waiting.sock.setblocking(True)
            self.heads[waiting.sock] = bytes(waiting.head)
            self.process_request(waiting.sock, waiting.address)

    def _end_slow(self) -> None:
        """Close the oldest connection with a response that takes over SLOW_SECONDS, to free a thread for a request."""
        since = time.monotonic() - SLOW_SECONDS
        slow = next((request for request, begun in list(self._in_threads.items()) if begun < since), None)
        if slow is not None:
            self._hang_up(slow)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a request in a new thread. Without a thread, close the connection and raise RuntimeError."""
        self._in_threads[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            self.shutdown_request(request)
            raise

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, whether its request was answered or not."""
        self._in_threads.pop(request, None)
        self.heads.pop(request, None)
        super().shutdown_request(request)
        self._ended.wake()

    def expire(self) -> None:
        """Close connections after their timeout, accept connections again, and start threads for waiting requests."""
        now = time.monotonic()
        for waiting in [waiting for waiting in self._waiting if waiting.until < now]:
            self._drop(waiting)
        for request in [request for request, begun in list(self._in_threads.items()) if begun + CLIENT_SECONDS < now]:
            self._hang_up(request)
        if self.socket not in self._selector.get_map():
            self._selector.register(self.socket, selectors.EVENT_READ, self._accept)
        self.answer()

    def _hang_up(self, request: Any) -> None:
        try:
            request.shutdown(socket.SHUT_RDWR)  # wakes the request's thread, which then exits
        except OSError:
            self._in_threads.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not log errors, because a client may close its connection at any time."""
