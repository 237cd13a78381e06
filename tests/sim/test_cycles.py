"""The order of the simulated driver's sources: no file uses another in a circle, and folders use only lower folders.

`tools/c_cycles.py` reads the symbols of the object files. Each program and library has a tree of objects of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

SCRIPT = ROOT / "tools" / "c_cycles.py"
# For each tree of objects its folders. A folder uses those before it, and itself.
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
def test_no_file_uses_itself_by_way_of_others(tools: Path, tree: str) -> None:
    assert_finds_nothing(tools / "obj" / tree)


@pytest.mark.parametrize("tree", TREES)
def test_folders_use_only_folders_before_them(tools: Path, tree: str) -> None:
    objects = tools / "obj" / tree
    assert {str(path.parent.relative_to(objects)) for path in objects.rglob("*.o")} == set(TREES[tree])
    assert_finds_nothing("--layers", ",".join(TREES[tree]), objects)


def test_every_source_is_part_of_something(tools: Path) -> None:
    objects = {path.relative_to(tools / "obj").parts[1:] for path in (tools / "obj").rglob("*.o")}
    sources = {path.relative_to(ROOT / "sim").with_suffix(".o").parts for path in (ROOT / "sim").rglob("*.c")}
    assert objects == sources
