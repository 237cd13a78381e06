"""BPF programs and shim for arm64, which are compiled here and never run.

The BPF programs equal those for x86-64, except for the places from which they read a function's arguments. This
machine's kernel verifies them: the verifier of an arm64 kernel is the same code, except for its description of the
registers.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from fgpu_ebpf.driver import attach, image, probe_plan
from tests.bpf.compile_kit import Instruction, compiled, image_for
from tests.bpf.conftest import REPOSITORY

CROSS = "aarch64-linux-gnu-gcc"
LOAD_8, LOAD_POINTER = 0x79, 0x18
# The registers that have a called function's first five arguments, as a program reads them.
REGISTERS = {112: 0, 104: 8, 96: 16, 88: 24, 72: 32}

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="on arm64, all other tests here run these programs"
)


@pytest.fixture(scope="module")
def both() -> tuple[dict[str, list[Instruction]], dict[str, list[Instruction]]]:
    return compiled("x86"), compiled("arm64")


def differences(here: list[Instruction], there: list[Instruction]) -> list[tuple[Instruction, Instruction]]:
    """Return instructions that differ, side by side. The descriptor of a map differs in every module."""
    assert len(here) == len(there)
    return [(a, b) for a, b in zip(here, there, strict=True) if a != b and a[0] != LOAD_POINTER]


def test_arm64_has_the_same_programs(both: tuple[dict[str, list[Instruction]], dict[str, list[Instruction]]]) -> None:
    here, there = both
    assert here.keys() == there.keys()
    assert {"admit", "give_back", "call_enter", "call_return", "adjust"} <= here.keys()
    for name in ("process_exit", "process_exec", "cgroup_made", "cgroup_populated"):  # they read no registers
        assert not differences(here[name], there[name])


def test_the_verifier_accepts_the_arm64_programs() -> None:
    pins = Path(f"/sys/fs/bpf/fgpu-arm64-{os.getpid()}")
    programs = image_for("arm64")
    try:
        image.load(programs, pins)
        assert {path.name for path in (pins / "programs").iterdir()} == programs.programs.keys()
    finally:
        attach.detach(pins)


@pytest.mark.parametrize(("program", "arguments"), [("give_back", 4), ("admit", 4)])
def test_arguments_are_read_from_arm64_registers(
    both: tuple[dict[str, list[Instruction]], dict[str, list[Instruction]]], program: str, arguments: int
) -> None:
    here, there = (code[program] for code in both)
    moved = {
        a[2]: b[2] for a, b in differences(here, there) if a[:2] == b[:2] and a[0] == LOAD_8 and a[2] >= 0
    }  # below 0: the stack
    assert moved == dict(list(REGISTERS.items())[:arguments])


# -- the shim


def output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which(CROSS):
        pytest.skip(f"no {CROSS}: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    out = tmp_path_factory.mktemp("arm64")
    output("make", "-s", "-C", REPOSITORY / "shim", f"CC={CROSS}", f"OUT={out}", f"HEADERS={REPOSITORY}/build/headers")
    return out / "libfgpu.so"


def symbols(path: Path, defined: bool) -> set[str]:
    """Return names of the dynamic table, with the versions of imported ones."""
    rows = [line.split() for line in output("readelf", "--dyn-syms", "-W", path).splitlines()]
    return {row[7] for row in rows if row[4:5] in (["GLOBAL"], ["WEAK"]) and (row[6] != "UND") == defined}


def test_the_arm64_shim_has_the_same_exports(shim: Path) -> None:
    assert "AArch64" in output("readelf", "-h", shim)
    names = symbols(shim, defined=True)
    assert {"dlsym", "fgpu_admit", "fgpu_release", "cuMemAlloc_v2"} <= names
    assert names == symbols(REPOSITORY / "build/shim/libfgpu.so", defined=True)


def test_the_arm64_shim_imports_only_symbols_that_every_glibc_has(shim: Path) -> None:
    assert re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", shim)) == ["libc.so.6"]
    versions = {name.partition("@")[2] for name in symbols(shim, defined=False) if "@" in name}
    assert versions == {"GLIBC_2.17"}  # the first version that has arm64


@pytest.mark.parametrize("name", ["fgpu_admit", "fgpu_release"])
def test_probe_symbols_of_the_arm64_shim_are_a_nop_and_a_return(shim: Path, name: str) -> None:
    offset = probe_plan.symbol_offsets(str(shim), [name])[name]
    assert struct.unpack_from("<2I", shim.read_bytes(), offset) == (0xD503201F, 0xD65F03C0)
