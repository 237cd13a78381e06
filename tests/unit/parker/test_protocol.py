"""The lines of the parker's socket."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fgpu_ebpf.parker.protocol import Named, Outcome, Request, RequestError, line, parse

PROCESSES = [{"pid": 7, "started": 70}]


def text(**fields: Any) -> bytes:
    return json.dumps({"op": "park", "processes": PROCESSES, **fields}).encode() + b"\n"


def test_a_request_has_defaults() -> None:
    assert parse(text()) == Request("park", (Named(7, 70),), 0, 5000, 30000)
    assert parse(text(op="wake", bytes=5, lock_ms=6, deadline_ms=7)) == Request("wake", (Named(7, 70),), 5, 6, 7)


@pytest.mark.parametrize(
    ("request_text", "error"),
    [
        (b"\n", "the request is not a line of JSON"),
        (b"[" * 60000 + b"\n", "the request is not a line of JSON"),
        (b"7\n", "the request has none of the operations park, wake, state"),
        (text(op="kill"), "the request has none of the operations park, wake, state"),
        (text(op=[]), "the request has none of the operations park, wake, state"),
        (text(processes=[]), "the request does not name 1 to 512 processes"),
        (text(processes=PROCESSES * 513), "the request does not name 1 to 512 processes"),
        (text(processes=[7]), "a process of the request is not an object"),
        (text(processes=PROCESSES * 2), "the request names a process twice"),
        (text(processes=[{"pid": 0, "started": 1}]), "pid is not a whole number from 1 to 1073741824"),
        (text(processes=[{"pid": True, "started": 1}]), "pid is not a whole number from 1 to 1073741824"),
        (text(processes=[{"pid": 7}]), f"started is not a whole number from 0 to {1 << 62}"),
        (text(bytes=-1), f"bytes is not a whole number from 0 to {1 << 50}"),
        (text(bytes="5"), f"bytes is not a whole number from 0 to {1 << 50}"),
        (text(lock_ms=0), "lock_ms is not a whole number from 1 to 3600000"),
        (text(deadline_ms=1e9), "deadline_ms is not a whole number from 1 to 3600000"),
    ],
)
def test_a_wrong_request_is_refused_with_a_sentence(request_text: bytes, error: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse(request_text)
    assert str(raised.value) == error


def test_replies_are_lines() -> None:
    assert line(Outcome("parked").reply()) == b'{"result":"parked"}\n'
    assert line(Outcome("lost", "why").reply()) == b'{"result":"lost","error":"why"}\n'
