"""The suites of whole processes use the product as its users do: none of their imports comes from fgpu_ebpf."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = "tests/support"
SUITES = ("dashboards", "e2e", "engines", "kubelet", "kubernetes", "packages", "page", "slurm", "standalone")
PRODUCT = "fgpu_ebpf"


def imported(file: Path) -> Iterator[str]:
    """Yield the name of every module that a file may import, at any place in it."""
    package = ".".join(file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def reached(start: Path) -> set[Path]:
    """Return the files of tests/ and bench/ that a file imports, directly or through others."""
    found, left = {start}, [start]
    while left:
        for name in imported(left.pop()):
            file = ROOT / f"{name.replace('.', '/')}.py"
            if name.startswith(("tests.", "bench.")) and file not in found and file.exists():
                found.add(file)
                left.append(file)
    return found


def offenders(folder: Path) -> list[str]:
    """Return `file imports module` for each import of the product that a file of the folder reaches."""
    files = {file for start in folder.rglob("*.py") for file in reached(start)}
    return sorted(
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imported(file)
        if name.partition(".")[0] == PRODUCT
    )


@pytest.mark.parametrize("folder", [LIBRARY, *(f"tests/{suite}" for suite in SUITES)])
def test_suites_of_whole_processes_import_nothing_of_the_product(folder: str) -> None:
    assert offenders(ROOT / folder) == []


def test_the_check_finds_an_import_of_the_product() -> None:
    """The unit tests import the product. The search finds these imports, also through another module."""
    assert offenders(ROOT / "tests/unit")
    assert ROOT / "tests/unit/policy_kit.py" in reached(ROOT / "bench/policy.py")


def test_the_support_library_imports_no_suite() -> None:
    for file in (ROOT / LIBRARY).rglob("*.py"):
        own = ("tests.support", "tests.world")
        others = [name for name in imported(file) if name.startswith("tests.") and not name.startswith(own)]
        assert others == [], file
