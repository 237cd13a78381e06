"""Tests of mutants: each applies, and every row of docs/security.md has tests and a patch that names one of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants.patches import Patch, patches
from tests.mutants.rules import RULES, Rule
from tests.rows import named_of_rows

ROOT = Path(__file__).parents[2]
ROWS = [*(f"T{n}" for n in range(1, 60)), *(f"F{n}" for n in range(1, 57))]


def exists(test: str) -> bool:
    file, _, name = test.partition("::")
    found = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    return name in {node.name for node in found if isinstance(node, ast.FunctionDef)}


def test_every_row_has_tests_and_patches() -> None:
    named = named_of_rows()
    assert list(named) == ROWS
    assert [row for row, tests in named.items() if not tests] == []
    assert {patch.row for patch in patches()} == set(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_the_tests_of_a_row_exist(row: str) -> None:
    for test in named_of_rows()[row]:
        assert exists(test), test


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.name)
def test_a_patch_applies_and_names_a_test_of_its_row(patch: Patch) -> None:
    patch.apply(ROOT, "--check")
    assert patch.test.partition("[")[0] in named_of_rows()[patch.row]


@pytest.mark.parametrize("name", RULES)
def test_the_text_of_a_rule_occurs_once_in_the_bpf_sources(name: str) -> None:
    old, new = RULES[name]
    assert old != new
    assert Rule(name).place(ROOT).name.endswith((".bpf.c", ".bpf.h"))
