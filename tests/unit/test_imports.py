"""Imports run one way, and the heavy ones stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "fgpu_ebpf"
# Each module may import those of earlier rows alone.
ORDER = (
    {"pages", "policy", "bpf", "checks", "snapshot", "procfs", "loader", "launch"},
    {"ledger", "door"},
    {"probes", "workloads", "clients"},
    {"devices", "callers"},
    {"reconcile"},
    {"view", "gatekeeper"},
    {"agent", "metrics", "tables"},
    {"server"},
    {"service"},
    {"cli"},
)
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


def imports(module: str) -> set[str]:
    tree, found = ast.parse((PACKAGE / f"{module}.py").read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "fgpu_ebpf":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fgpu_ebpf."):
            found.add(node.module.split(".")[1])  # type: ignore[union-attr]
    return found & set(MODULES)


def rank(module: str) -> int:
    return next(i for i, row in enumerate(ORDER) if module in row)


def test_every_module_has_its_place():
    assert set(MODULES) == set().union(*ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert {name for name in imports(module) if rank(name) >= rank(module)} == set()


def test_the_loader_imports_nothing_of_ours():
    assert imports("loader") == set()
    assert "fgpu_ebpf" not in (PACKAGE / "loader.py").read_text()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("gatekeeper", {"bcc", "pynvml", "prometheus_client", "click", "rich", "psutil", "elftools", "asyncio"}),
        ("service", {"bcc", "rich", "psutil", "click"}),
        ("cli", {"bcc", "pynvml", "prometheus_client", "rich", "psutil"}),
    ],
)
def test_heavy_modules_stay_out(module, heavy):
    code = f"import sys, fgpu_ebpf.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert heavy & set(done.stdout.split()) == set()


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert text.count("\n") <= 400
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60] == []
    assert ast.get_docstring(tree)
    public = [f for f in functions if not f.name.startswith("_")]
    nested = {n.name for f in functions for n in ast.walk(f) if isinstance(n, ast.FunctionDef) and n is not f}
    assert [f.name for f in public if not ast.get_docstring(f) and f.name not in nested] == []
