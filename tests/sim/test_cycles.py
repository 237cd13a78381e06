"""The order of the simulated driver's sources: files have no cycles, and folders use only lower folders.

`tools/c_cycles.py` reads the symbols of the object files. Each program and library has its own tree of objects.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

SCRIPT = ROOT / "tools" / "c_cycles.py"
# The folders of each tree of objects. A folder uses the folders before it, and itself.
TREES = {
    "libcuda": (
        *("wire", "cuda/data", "cuda/core", "cuda/stream", "cuda/memory"),
        *("cuda/code", "cuda/graph", "cuda/async", "cuda/context", "cuda/entry"),
    ),
    "libnvidia-ml": ("wire", "nvml/data", "nvml"),
    "fgpu-simd": ("wire", "server/data", "server"),
    "nvidia-smi": ("smi",),
}


def assert_finds_nothing(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("tree", TREES)
def test_the_files_of_each_tree_have_no_cycle(tools: Path, tree: str) -> None:
    assert_finds_nothing(tools / "obj" / tree)


@pytest.mark.parametrize("tree", TREES)
def test_folders_use_only_folders_before_them(tools: Path, tree: str) -> None:
    objects = tools / "obj" / tree
    assert {str(path.parent.relative_to(objects)) for path in objects.rglob("*.o")} == set(TREES[tree])
    assert_finds_nothing("--layers", ",".join(TREES[tree]), objects)


def test_every_source_belongs_to_a_program_or_library(tools: Path) -> None:
    objects = {path.relative_to(tools / "obj").parts[1:] for path in (tools / "obj").rglob("*.o")}
    sources = {path.relative_to(ROOT / "sim").with_suffix(".o").parts for path in (ROOT / "sim").rglob("*.c")}
    assert objects == sources
