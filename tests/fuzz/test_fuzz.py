"""Every fuzzer runs its corpus and ten thousand further inputs. `./dev test fuzz NAME` runs one of them for long."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import corpora, fuzz_kit
from tests.fuzz.corpora import HERE
from tests.fuzz.fuzz_c import HARNESSES, ROOT

PYTHON = sorted(
    path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py") if path.stem not in ("fuzz_kit", "fuzz_c")
)
COUNTS = 1_000, 10_000, 100_000
SAID = re.compile(r"(\d+) inputs, (\d+) runs, (-?\d+) bytes more")


def run(*command: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ASAN_OPTIONS": "abort_on_error=0"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=280, env=environment, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@pytest.mark.parametrize("name", PYTHON)
def test_each_python_fuzzer_finds_no_error(name: str, scale: Callable[[int, int, int], int]) -> None:
    runs = scale(*COUNTS)
    inputs, done, grown = map(int, SAID.findall(run(sys.executable, "-m", "tests.fuzz.fuzz_kit", name, runs))[0])
    assert (inputs >= 6, done) == (True, runs)
    assert grown <= corpora.MIB


@pytest.mark.parametrize("name", HARNESSES)
def test_each_c_fuzzer_finds_no_error(name: str, scale: Callable[[int, int, int], int], tmp_path: Path) -> None:
    runs = scale(*COUNTS)
    program = HARNESSES[name].build(tmp_path)
    inputs, done, grown = map(int, SAID.findall(run(program, corpora.CORPUS / name, runs))[0])
    assert (inputs >= 6, done) == (True, runs)
    assert grown <= corpora.MIB


def test_every_corpus_has_a_fuzzer() -> None:
    assert {path.name for path in corpora.CORPUS.iterdir()} == {*PYTHON, *HARNESSES}


def test_the_measurement_detects_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """This proves that the tests above can detect growth."""
    kept: list[bytes] = []
    assert fuzz_kit.run(lambda data: kept.append(data + b"x" * (1 << 15)), "hello", 2_000) > corpora.MIB
