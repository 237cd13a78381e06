"""Tests of the exit status of bench.park_cycles."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.benchmark_kit import benchmarks


class Tenant:
    """A tenant without drift."""

    name = "one"

    def __init__(self, folder: Path) -> None:
        self.folder, self._programs = folder, list[Any]()

    def memory(self) -> dict[str, int]:
        return {"drift_bytes": 0}


class Program:
    """A program with data that are always right."""

    def __init__(self, *_: object) -> None:
        self._answers = ["ready"]

    def send(self, _: str) -> None:
        self._answers.append("intact")

    def receive(self, _: float) -> str:
        return self._answers.pop()

    def complaints(self) -> str:
        return ""


class Service:
    """A service with this process as its agent."""

    class agent:
        pid = os.getpid()


Park = Callable[[], int]


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Park], int]]:
    """Return a function that runs the benchmark's main() with a stand-in for `fgpu park`, and returns its result."""

    class Place:
        def tenant(self, _: int) -> Tenant:
            return Tenant(tmp_path)

    @contextlib.contextmanager
    def running(*_: object) -> Iterator[tuple[Service, Place]]:
        yield Service(), Place()

    with benchmarks(monkeypatch):
        from bench import park_cycles

        def run(park: Park) -> int:
            def fgpu(verb: str, *_: object, **__: object) -> subprocess.CompletedProcess[str]:
                return subprocess.CompletedProcess([], park() if verb == "park" else 0, "", "busy")

            monkeypatch.setattr(park_cycles, "fgpu", fgpu)
            return park_cycles.main()

        for name, value in {"host": running, "parking": running, "Program": Program, "_lacks": lambda _: True}.items():
            monkeypatch.setattr(park_cycles, name, value)
        monkeypatch.setattr(park_cycles, "state", lambda _: "parked")
        monkeypatch.setattr("sys.argv", ["park_cycles", "--seconds", "0.05"])
        yield run


def test_cycles_without_a_fault_are_a_success(status: Callable[[Park], int]) -> None:
    assert status(lambda: 0) == 0


def test_a_run_without_a_cycle_fails(status: Callable[[Park], int]) -> None:
    assert status(lambda: 1) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unexpected_error_of_a_thread_is_a_fault(
    status: Callable[[Park], int], capsys: pytest.CaptureFixture[str]
) -> None:
    def park() -> int:
        raise ValueError("no state here")

    assert status(park) == 1
    assert "FAULT ValueError: no state here" in capsys.readouterr().out


def test_sigterm_ends_the_run_in_order(status: Callable[[Park], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Program, "receive", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        status(lambda: 0)
