"""Tests of the sources without running them: warnings are errors, and `./dev check` finds nothing and stays as strict.

The properties of the built files (RELRO, exports, the oldest glibc) are in shim/test_shim_binary.py,
sim/test_binaries.py and engines/test_helper.py; the order of imports is in test_imports.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
# A small source of each part, and the file that make builds of that source alone.
PARTS = {
    "shim": ("standalone/liveness.c", "obj/standalone/liveness.c.o"),
    "sim": ("server/utilization.c", "obj/fgpu-simd/server/utilization.o"),
    "oci": ("json.c", "fgpu-oci"),
}


def make(part: str, folder: Path) -> subprocess.CompletedProcess[str]:
    target = folder / "out" / PARTS[part][1]
    command = ["make", "-s", "-C", folder / part, f"OUT={folder}/out", f"HEADERS={ROOT}/build/headers", "CFLAGS=-O0"]
    return subprocess.run([*command, target], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("part", PARTS)
def test_a_warning_is_an_error(part: str, tmp_path: Path) -> None:
    """A warning is an error with any flags."""
    for folder in (part, "bpf"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    assert make(part, tmp_path).returncode == 0
    source = tmp_path / part / PARTS[part][0]
    source.write_text(source.read_text() + "static int nobodys;\n")
    done = make(part, tmp_path)
    assert done.returncode != 0
    assert "unused-variable" in done.stderr


def test_no_source_silences_warnings_of_a_whole_file_or_without_a_code() -> None:
    silence = re.compile(r"#\s*pragma\s+GCC\s+(diagnostic|system_header)|-Wno-error")
    files = [path for part in PARTS for path in (ROOT / part).rglob("*") if path.is_file()]
    assert [path.name for path in files if silence.search(path.read_text())] == []
    files = [*(ROOT / "fgpu_ebpf").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    whole = re.compile(r"^#\s*(mypy:|ruff: noqa|flake8: noqa)", re.M)
    assert [path.name for path in files if whole.search(path.read_text())] == []
    bare = re.compile(r"#\s*(type: ignore(?!\[)|noqa(?!: [A-Z]))")
    assert [path.name for path in (ROOT / "fgpu_ebpf").rglob("*.py") if bare.search(path.read_text())] == []


def test_mypy_checks_the_whole_package_strictly() -> None:
    mypy = dict(SETTINGS["mypy"])
    assert mypy.pop("strict") is True
    assert mypy.pop("files") == ["fgpu_ebpf"]
    assert mypy.pop("overrides")[0].keys() == {"module", "ignore_missing_imports"}
    assert mypy.keys() == {"python_version"}


def test_ruff_excludes_only_build_and_ignores_no_selected_rule() -> None:
    """Ruff excludes no file of the sources and silences no rule. `I` is the order of imports within a file."""
    lint = SETTINGS["ruff"]["lint"]
    assert {"B", "C90", "E", "F", "I", "UP", "W"} <= set(lint["select"])
    assert lint.keys() == {"select", "mccabe"}
    assert SETTINGS["ruff"]["extend-exclude"] == ["build"]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="check asks git which files there are")
def test_check_finds_nothing() -> None:
    done = subprocess.run([ROOT / "dev", "check"], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing found" in done.stderr
