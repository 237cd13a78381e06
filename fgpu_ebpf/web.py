"""The metrics address: HTTP, at most eight at a time, each for a few seconds.

Owns: the listening socket, and a thread for each client. Never: waits for a client: one that is slow, or one too many,
is hung up on. On failure: OSError, where the address is taken.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

MOST_CLIENTS = 8
CLIENT_SECONDS = 10.0


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


class _Quiet(WSGIRequestHandler):
    timeout = CLIENT_SECONDS / 2  # of silence

    def log_message(self, *_: Any) -> None:
        """Requests are no news."""


class Web(ThreadingMixIn, WSGIServer):
    """Serves `app` at host:port: handle_request() takes in who is there, expire() ends who has been there too long.

    `names`: what it may be asked for by; none: any name, or where no other host reaches it, localhost alone.
    """

    daemon_threads = True
    block_on_close = False
    timeout = 0.0  # handle_request waits for nobody

    def __init__(self, host: str, port: int, app: WSGIApplication, names: Collection[str] = ()) -> None:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self.address_family = family
        self._here: dict[Any, float] = {}  # until when
        super().__init__(address[:2], _Quiet)  # type: ignore[arg-type]
        is_ours_alone = ipaddress.ip_address(address[0]).is_loopback
        self.set_app(called(names, app) if names or is_ours_alone else app)
        self.socket.setblocking(False)  # who has hung up meanwhile must not be waited for

    def server_bind(self) -> None:
        """Without the name that the library would look up, and wait for."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Is there a place?"""
        return len(self._here) < MOST_CLIENTS

    def process_request(self, request: Any, client_address: Any) -> None:
        """On a thread of its own."""
        self._here[request] = time.monotonic() + CLIENT_SECONDS
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """It has its answer, or none."""
        self._here.pop(request, None)
        super().shutdown_request(request)

    def expire(self) -> None:
        """Hangs up on who has been here for too long."""
        now = time.monotonic()
        for request in [request for request, until in list(self._here.items()) if until < now]:
            try:
                request.shutdown(socket.SHUT_RDWR)  # its thread wakes, and ends
            except OSError:
                self._here.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""
