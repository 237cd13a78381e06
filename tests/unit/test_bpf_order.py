"""Each header of the BPF programs uses only earlier ones (tools/bpf_order.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/bpf_order.py", folder]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for path in (ROOT / "bpf").glob("*.[ch]"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_each_part_uses_only_itself_and_earlier_parts() -> None:
    done = check(ROOT / "bpf")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_check_finds_a_forward_declaration(copy: Path) -> None:
    with (copy / "maps.bpf.h").open("a") as part:
        part.write("\nstatic int fits(struct fgpu_usage_page *page, u32 device,\n                u64 bytes);\n")
    assert "maps.bpf.h: fits is declared, not defined\n" in check(copy).stdout


def test_the_check_finds_a_call_of_a_later_part(copy: Path) -> None:
    with (copy / "levels.bpf.h").open("a") as part:
        part.write("\nstatic void early(struct fgpu_process *p)\n{\n    release(p, 0, 1); /* let_go() is none */\n}\n")
    done = check(copy)
    assert (done.returncode, done.stdout) == (1, "levels.bpf.h calls release of orphans.bpf.h, which comes later\n")


def test_the_check_finds_a_part_that_is_not_included(copy: Path) -> None:
    (copy / "spare.bpf.h").touch()
    assert check(copy).stdout == "spare.bpf.h: fgpu.bpf.c includes it 0 times\n"
