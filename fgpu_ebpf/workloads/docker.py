"""A client of the HTTP API that Docker and Podman serve: the list of containers, and the labels of an image.

The client runs in an engine thread of the agent, and only reads. The time and size of an answer are bounded, unlike in
the Docker SDK. The client calls `inspect` only for a running container whose image the list names by its id, because
`inspect` waits for a container that is starting.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from fgpu_ebpf.workloads import engine_answers
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.engine_answers import AnswerError, EngineError
from fgpu_ebpf.workloads.workload import Names, Subject

DEADLINE_SECONDS = 2.0
MOST_BYTES = 4 << 20


class _Socket(socket.socket):
    """A connection with a deadline (`until`, CLOCK_MONOTONIC) and a maximum number of bytes to receive (`left`)."""

    until = 0.0
    left = MOST_BYTES

    def wait(self) -> None:
        """Set the timeout of the next call to the remaining time. Raise TimeoutError if no time remains."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {DEADLINE_SECONDS:g} s")
        self.settimeout(left)

    def recv_into(self, *args: Any) -> int:
        """Receive as socket.recv_into() does, which http.client calls for all reads.

        Raises:
            TimeoutError: the deadline has passed.
            AnswerError: the answer is longer than MOST_BYTES.
        """
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
        """Connect to the engine's socket. Raise OSError if the connection fails."""
        sock = _Socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock = sock
        sock.until = time.monotonic() + DEADLINE_SECONDS
        sock.wait()
        sock.connect(self._path)


class DockerApi:
    """A client of the engine at one socket."""

    can_rename = True

    def __init__(self, engine: Engine, path: str) -> None:
        self.name = engine.value
        self.path = path
        self._engine = engine

    def serves(self, subject: Subject) -> bool:
        """Return whether this engine can have this container."""
        return subject.engine is self._engine and not subject.is_pod

    def close(self) -> None:
        """Do nothing, because each request has a connection of its own."""

    def ask(self, subject: Subject) -> Names | None:
        """Return the names of a container, or None for an unknown container.

        Raise EngineError or AnswerError on failure.
        """
        wanted = quote(json.dumps({"id": [subject.id]}))
        found = engine_answers.of_docker(self._get(f"/containers/json?all=true&filters={wanted}"), subject.id)
        if found is None:
            return None
        names, image, runs = found
        if runs and names.image == image:  # Docker's list names an image by its id once the tag has moved
            names = replace(names, image=self._given_image(subject) or image)
        if not engine_answers.asks_anything(names.labels):
            return names
        image_answer = self._get(f"/images/{quote(image, safe=':')}/json") if image else None
        labels = None if image_answer is None else engine_answers.docker_image_labels(image_answer)
        return engine_answers.with_image(names, labels)

    def _given_image(self, subject: Subject) -> str | None:
        """Return the image by which a running container was created, or None if the engine does not report the image.

        An engine that does not answer about this container may answer about other containers.
        """
        with contextlib.suppress(EngineError, AnswerError):
            return engine_answers.docker_given_image(self._get(f"/containers/{subject.id}/json"))
        return None

    def _get(self, target: str) -> Any:
        """Return the JSON document at `target`, or None for status 404. Raise EngineError or AnswerError on failure."""
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
            raise AnswerError("is not JSON") from error
