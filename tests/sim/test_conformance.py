"""The simulated driver returns the results that a real H200 (driver 580.159.04) returned earlier to the same calls.

Calls that have not been made on a card yet are in conformance_unrecorded.txt. Calls that need no card are in
conformance_no_device.txt.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sim.conformance_kit import NO_DEVICE, REAL, WAITING

from .conftest import HEADERS, HERE, ROOT, Machine

SOURCES = "".join(path.read_text() for path in sorted(HERE.glob("conformance*.c")))


def explained() -> dict[str, str]:
    """Return the lines that may differ, by name, as the simulated driver prints them. The file has the reasons."""
    lines = (HERE / "conformance_differences.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("section", REAL)
def test_the_simulated_driver_answers_as_the_real_one(
    make_machine: Callable[..., Machine], program: Path, section: str
) -> None:
    answers = make_machine().run(program, section).stdout.splitlines()
    expected = []
    allowed = explained()
    for line in REAL[section]:
        name = line.split(" ", 1)[0]
        expected.append(f"{name} {allowed[name]}" if name in allowed else line)
    assert answers == expected


@pytest.mark.parametrize("section", WAITING | NO_DEVICE)
def test_calls_that_were_made_on_no_card_have_the_stored_answers(
    make_machine: Callable[..., Machine], program: Path, section: str
) -> None:
    answers = make_machine().run(program, section).stdout.splitlines()
    expected = (WAITING | NO_DEVICE)[section]
    assert [line for line in answers if not line.startswith("uninitialised.")] == expected
    names = [line.split(" ", 1)[0] for line in expected]
    assert len(set(names)) == len(names)


def test_every_section_is_recorded_or_listed_as_unrecorded() -> None:
    """Recorded sections are removed from conformance_unrecorded.txt, and each section is in one of the files."""
    assert not WAITING.keys() & REAL.keys()
    table = SOURCES[SOURCES.index("sections[] = ") :]
    in_program = set(re.findall(r'\{"(\w+)", check_\w+\}', table[: table.index("};")]))
    assert in_program == {"uninitialised", *REAL, *WAITING, *NO_DEVICE}


def hooked() -> set[str]:
    return set(re.findall(r"\bHOOK\((\w+)\)", (ROOT / "shim/core/hook_table.h").read_text()))


def unasked() -> dict[str, str]:
    lines = (HERE / "conformance_unasked.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if not line.startswith("#"))


def test_the_program_calls_all_but_listed_hooks_and_each_listed_hook_has_a_reason() -> None:
    reasons = unasked()
    asked = set(re.findall(r"(?:\bCALL\(|\b(?:TRY|LIST)\([^,()]+,)\s*(\w+)", SOURCES))
    assert hooked() - asked == reasons.keys()
    assert all(len(reason.split()) > 3 for reason in reasons.values())


def test_the_program_calls_all_but_listed_cuda_hooks_before_the_driver_is_initialized() -> None:
    asked = {line.split()[0].removeprefix("unready.") for line in NO_DEVICE["unready"]}
    assert {name for name in hooked() if name.startswith("cu")} - asked - unasked().keys() == {"cuInit"}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shim")
    make = ["make", "-s", "-C", ROOT / "shim", f"OUT={out}", f"HEADERS={HEADERS}"]
    subprocess.run([str(word) for word in make], check=True, timeout=120)
    return out / "libfgpu.so"


@pytest.mark.parametrize("section", REAL | WAITING | NO_DEVICE)
def test_the_shim_changes_no_answer(
    make_machine: Callable[..., Machine], program: Path, shim: Path, section: str
) -> None:
    """Errors, their order, and the addresses that a lookup returns stay the same in a process without a limit."""
    plain = make_machine().run(program, section).stdout
    machine = make_machine()
    through = machine.run("env", f"LD_PRELOAD={shim}", program, section).stdout
    assert through == plain


def test_every_call_has_an_answer(machine: Machine, program: Path) -> None:
    """All sections run. No call is missing, and the program completes."""
    answers = machine.run(program).stdout.splitlines()
    unknown = ["sharing.import.closed 999", "pool_handles.import.closed 999"]  # a real card returns this error too
    assert [line for line in answers if line.split(" ")[1] == "999"] == unknown
    assert answers[-1] == "fork.status 0"
    assert "array.create 0" in answers  # no capture was left open
    asked = {line.split(".", 1)[0] for line in answers}
    assert asked >= {"nvml", "device", "capture", "graph", "module", "array", "managed", "old", "sharing", "lookup"}


def test_every_explained_difference_exists() -> None:
    real = {line for lines in REAL.values() for line in lines}
    names = {line.split(" ", 1)[0] for line in real}
    for name, value in explained().items():
        assert name in names
        assert f"{name} {value}" not in real
