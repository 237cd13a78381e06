"""Every mutant of the kernel's side still has its place: one whose text has changed would break nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
import mutants


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_its_text_stands_once(name: str) -> None:
    old, new = mutants.MUTANTS[name]
    assert old != new
    assert mutants.place(name).name.endswith((".bpf.c", ".bpf.h"))
