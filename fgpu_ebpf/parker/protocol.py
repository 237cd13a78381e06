"""The requests and replies of the parker's socket: one JSON object in a line.

A request names processes by their pid and their start time in clock ticks since boot, as returned by `procfs.started`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MOST_LINE_BYTES = 1 << 16
MOST_PROCESSES = 512
MOST_MS = 3_600_000
MOST_BYTES = 1 << 50
LOCK_MS, DEADLINE_MS = 5_000, 30_000
OPS = ("park", "wake", "state")
UNCHANGED = {"park": "running", "wake": "parked"}  # the state after a refused request

Say = Callable[[Mapping[str, Any]], None]


class RequestError(Exception):
    """A request that cannot be carried out, with the reason as a sentence."""


class Named(NamedTuple):
    """A process by its pid and its start time in clock ticks since boot."""

    pid: int
    started: int


class Request(NamedTuple):
    """A request to park or wake processes, or for the state of processes.

    `size`: the most bytes of device memory that the processes hold together. `lock_ms`: the time for locking all
    processes. `deadline_ms`: no process is checkpointed later than this time after the start.
    """

    op: str
    processes: tuple[Named, ...]
    size: int = 0
    lock_ms: int = LOCK_MS
    deadline_ms: int = DEADLINE_MS


class Outcome(NamedTuple):
    """The end of a job: `running`, `parked` or `lost`, with the reason if another state was requested.

    `is_unchanged`: the job has changed no state of a process.
    """

    result: str
    error: str = ""
    is_unchanged: bool = False

    def reply(self) -> dict[str, Any]:
        """Return the reply with this outcome."""
        said = {"result": self.result, **({"error": self.error} if self.error else {})}
        return {**said, "changed": False} if self.is_unchanged else said


def line(reply: Mapping[str, Any]) -> bytes:
    """Return a reply as one line of JSON."""
    return json.dumps(reply, separators=(",", ":")).encode() + b"\n"


def parse(text: bytes) -> Request:
    """Return the request in a line. Raise RequestError on failure."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError("the request is not a line of JSON") from None
    if not isinstance(found, dict) or found.get("op") not in OPS:
        raise RequestError(f"the request has none of the operations {', '.join(OPS)}")
    return Request(
        found["op"],
        _processes(found.get("processes")),
        _number(found, "bytes", 0, 0, MOST_BYTES),
        _number(found, "lock_ms", LOCK_MS, 1, MOST_MS),
        _number(found, "deadline_ms", DEADLINE_MS, 1, MOST_MS),
    )


def _processes(found: Any) -> tuple[Named, ...]:
    if not isinstance(found, list) or not 1 <= len(found) <= MOST_PROCESSES:
        raise RequestError(f"the request does not name 1 to {MOST_PROCESSES} processes")
    if not all(isinstance(process, dict) for process in found):
        raise RequestError("a process of the request is not an object")
    named = [Named(_number(p, "pid", 0, 1, 1 << 30), _number(p, "started", -1, 0, 1 << 62)) for p in found]
    if len({process.pid for process in named}) < len(named):
        raise RequestError("the request names a process twice")
    return tuple(named)


def _number(found: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = found.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{name} is not a whole number from {least} to {most}")
    return value
