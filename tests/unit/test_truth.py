"""Tests of what `./dev bench truth` requires besides equal figures: the probes recorded the memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from bench import truth
from bench.lib import phases

MIB = 1 << 20


class Framework:
    """Stands for a program with two phases, which holds `least` bytes after the first phase and none after the second.

    The agent has corrected the ledger by NVML: both show what the program holds, whatever the probes recorded.
    """

    def __init__(self, name: str, phase: str, least: int, recorded: dict[str, int]) -> None:
        self.name = f"truth-{name}"
        self.figures = {"used_bytes": 0, "admitted_bytes": 0, "witnessed_bytes": 0}
        self._lines, self._recorded = self._phases(name, phase, least), recorded

    def say(self, _: str) -> None: ...

    def hear(self) -> str:
        return json.dumps(next(self._lines))

    def _phases(self, name: str, phase: str, least: int) -> Iterator[dict[str, Any]]:
        self.figures |= self._recorded | {"used_bytes": least}
        yield phases.said(name, phase, least)
        self.figures["used_bytes"] = 0
        yield phases.said(name, "shrink", 0)
        yield {"end": True}


def run(monkeypatch: pytest.MonkeyPatch, framework: Framework) -> list[truth.Phase] | str:
    monkeypatch.setattr(truth, "AFTER_SECONDS", 0)
    monkeypatch.setattr(truth, "memory_of", lambda _: dict(framework.figures))
    monkeypatch.setattr(truth, "nvml_bytes", lambda _: framework.figures["used_bytes"])
    program: Any = framework
    return truth.phases(program)


def test_memory_that_the_probes_have_recorded_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, Framework("torch", "grow", 8 * MIB, {"witnessed_bytes": 9 * MIB}))
    assert found == [truth.Phase("grow", 8 * MIB, 8 * MIB), truth.Phase("shrink", 0, 0)]


@pytest.mark.parametrize("witnessed", [0, 8 * MIB - 1])
def test_memory_that_no_probe_has_recorded_fails(monkeypatch: pytest.MonkeyPatch, witnessed: int) -> None:
    recorded = {"witnessed_bytes": witnessed, "admitted_bytes": 8 * MIB}
    found = run(monkeypatch, Framework("torch", "grow", 8 * MIB, recorded))
    assert found == f"failed: grow: witnessed_bytes grew by {witnessed} of {8 * MIB} bytes"


@pytest.mark.parametrize(("name", "phase"), [("cupy", "async"), ("pool", "grow"), ("pool", "own")])
def test_the_growth_of_a_pool_has_no_probe_but_an_admission(
    monkeypatch: pytest.MonkeyPatch, name: str, phase: str
) -> None:
    assert not isinstance(run(monkeypatch, Framework(name, phase, 8 * MIB, {"admitted_bytes": 8 * MIB})), str)
    found = run(monkeypatch, Framework(name, phase, 8 * MIB, {}))
    assert found == f"failed: {phase}: admitted_bytes grew by 0 of {8 * MIB} bytes"


def test_a_failed_program_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "record", lambda *_: None)
    assert truth.report({"torch": "failed: grow"}, 8 * MIB) == 1
