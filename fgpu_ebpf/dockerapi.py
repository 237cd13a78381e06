"""Docker and Podman, by what both answer on their sockets: the list of containers, and an image's labels.

Owns: the question, its deadline and the longest answer. Never: asks for what waits for a container (`inspect` does, for
one that is starting), or writes. On failure: EngineError, AnswerError.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any
from urllib.parse import quote

from fgpu_ebpf import answers
from fgpu_ebpf.answers import AnswerError, EngineError
from fgpu_ebpf.cgroupnames import Engine
from fgpu_ebpf.identity import Names, Subject

DEADLINE_SECONDS = 2.0
MOST_BYTES = 4 << 20


class _Socket(socket.socket):
    """A connection that is over at its deadline, and when it has said too much."""

    until = 0.0
    left = MOST_BYTES

    def wait(self) -> None:
        """Every call that follows waits no longer than what is left. Raises TimeoutError."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {DEADLINE_SECONDS:g} s")
        self.settimeout(left)

    def recv_into(self, *args: Any) -> int:
        """As a socket's, by which http.client reads everything."""
        self.wait()
        try:
            count = super().recv_into(*args)
        except TimeoutError:
            raise TimeoutError(f"no answer within {DEADLINE_SECONDS:g} s") from None
        self.left -= count
        if self.left < 0:
            raise AnswerError(f"is longer than {MOST_BYTES >> 20} MiB")
        return count


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """To the engine's socket. Raises OSError."""
        sock = _Socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock = sock
        sock.until = time.monotonic() + DEADLINE_SECONDS
        sock.wait()
        sock.connect(self._path)


class DockerApi:
    """The engine behind one socket."""

    def __init__(self, engine: Engine, path: str) -> None:
        self.name = engine.value
        self.path = path
        self._engine = engine

    def serves(self, subject: Subject) -> bool:
        """It may know of it."""
        return subject.engine is self._engine and not subject.is_pod

    def ask(self, subject: Subject) -> Names | None:
        """What it says; None: it has no such container. Raises EngineError, AnswerError."""
        wanted = quote(json.dumps({"id": [subject.id]}))
        found = answers.of_docker(self._get(f"/containers/json?all=true&filters={wanted}"), subject.id)
        if found is None:
            return None
        names, image = found
        if not answers.asks_anything(names.labels):
            return names
        said = self._get(f"/images/{quote(image, safe=':')}/json") if image else None
        return answers.with_image(names, None if said is None else answers.docker_image_labels(said))

    def _get(self, target: str) -> Any:
        """The document; None: there is none. Raises EngineError, AnswerError."""
        connection = _Connection(self.path)
        try:
            connection.request("GET", target)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(str(error) or type(error).__name__) from error
        finally:
            connection.close()
        if response.status == 404:
            return None
        if response.status != 200:
            raise EngineError(f"HTTP status {response.status}")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise AnswerError("is no JSON") from error
