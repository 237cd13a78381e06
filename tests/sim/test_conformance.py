"""The same questions to the simulated driver and, earlier, to a real H200 (driver 580.159.04): the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import HERE, Machine


def sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("=== "):
            lines = found.setdefault(line[4:], [])
        elif line:
            lines.append(line)
    return found


REAL = sections((HERE / "conformance_h200.txt").read_text())


def explained() -> dict[str, str]:
    """Lines that may differ: name -> what the simulated driver says; the reasons stand beside them in the file."""
    lines = (HERE / "conformance_differences.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("section", REAL)
def test_as_the_real_driver(make_machine: Callable[..., Machine], program: Path, section: str) -> None:
    answers = make_machine().run(program, section).stdout.splitlines()
    expected = []
    allowed = explained()
    for line in REAL[section]:
        name = line.split(" ", 1)[0]
        expected.append(f"{name} {allowed[name]}" if name in allowed else line)
    assert answers == expected


def test_every_question_has_an_answer(machine: Machine, program: Path) -> None:
    """Asked of all sections: nothing that is asked for is missing, and the program comes to its end."""
    answers = machine.run(program).stdout.splitlines()
    assert [line for line in answers if line.split(" ")[1] == "999"] == ["sharing.import.closed 999"]
    assert answers[-1] == "fork.status 0"
    assert "array.create 0" in answers  # no capture was left open
    asked = {line.split(".", 1)[0] for line in answers}
    assert asked >= {"nvml", "device", "capture", "graph", "module", "array", "managed", "old", "sharing", "lookup"}


def test_explained_differences_are_differences() -> None:
    real = {line for lines in REAL.values() for line in lines}
    names = {line.split(" ", 1)[0] for line in real}
    for name, value in explained().items():
        assert name in names
        assert f"{name} {value}" not in real
