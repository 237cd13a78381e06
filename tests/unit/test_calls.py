"""Tests of which figures `./dev bench calls` accepts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import calls

MIB = 1 << 20
LIMIT = 1024 * MIB
USABLE = 512 * MIB


class Filled:
    """Stands for the program in a tenant: it has printed these figures."""

    def __init__(self, said: dict[str, int]) -> None:
        self.name, self._said = "filled", said

    def hear(self) -> str:
        return json.dumps(self._said)

    def end(self) -> None: ...


def found(monkeypatch: pytest.MonkeyPatch, kind: str, used: int = LIMIT, **said: int) -> dict[str, Any]:
    """Return the figures of a kind of call. `said`: what the program has printed, if not that it filled its limit."""
    printed = {"usable_bytes": USABLE, "got_bytes": USABLE, "code": calls.OUT_OF_MEMORY} | said
    monkeypatch.setattr(calls, "Program", lambda *_: Filled(printed))
    monkeypatch.setattr(calls, "memory_of", lambda _: {"used_bytes": used, "drift_bytes": 0})
    monkeypatch.setattr(calls, "RECONCILED_SECONDS", 0)
    return calls.one(("driver", kind), LIMIT, "")


@pytest.mark.parametrize("kind", ["alloc", "graph"])
def test_a_program_that_filled_its_limit_exactly_holds(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert calls.held(found(monkeypatch, kind))


@pytest.mark.parametrize("kind", ["alloc", "graph"])
@pytest.mark.parametrize(
    "said",
    [
        {"got_bytes": 2 * USABLE},
        {"used": 2 * LIMIT},
        {"code": 0},
        {"got_bytes": USABLE // 2},
    ],
    ids=str,
)
def test_a_limit_that_was_exceeded_or_not_filled_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, kind: str, said: dict[str, int]
) -> None:
    assert not calls.held(found(monkeypatch, kind, **said))


@pytest.mark.parametrize("said", [{"got_bytes": USABLE + 2 * MIB}, {"used": LIMIT + 38 * MIB}], ids=str)
def test_only_a_pool_s_last_block_may_exceed_the_limit(monkeypatch: pytest.MonkeyPatch, said: dict[str, int]) -> None:
    kinds = ("alloc", "array", "create", "async", "from_pool", "graph")
    held = [kind for kind in kinds if calls.held(found(monkeypatch, kind, **said))]
    assert held == ["async", "from_pool", "graph"]


def test_the_excess_that_only_the_program_has_seen_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.say("driver_alloc", found(monkeypatch, "alloc", got_bytes=2 * USABLE))
    assert capsys.readouterr().out == f"driver_alloc_usable 200.00 %\ndriver_alloc_beyond_limit {USABLE} bytes\n"


def test_graphs_may_request_less_than_the_driver_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = found(monkeypatch, "graph", got_bytes=USABLE // 16, taken_bytes=USABLE)
    assert calls.held(said)
    calls.say("driver_graph", said)
    assert capsys.readouterr().out == "driver_graph_usable 100.00 %\ndriver_graph_asked_for 6.25 %\n"
