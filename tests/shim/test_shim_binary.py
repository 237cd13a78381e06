"""The file itself: what it needs, what it shows, and the bytes that the kernel depends on."""

import re
import subprocess
from pathlib import Path

import pytest
from shim_kit import ROOT, Build


def output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, timeout=20).stdout


def hooks() -> set[str]:
    """The names of the table, as the source has it."""
    return set(re.findall(r"\b(?:HOOK|ASK)\((\w+)\)", (ROOT / "shim" / "shim.h").read_text()))


def exported(path: Path) -> set[str]:
    return {line.split()[-1] for line in output("nm", "-D", "--defined-only", path).splitlines()}


def needed(path: Path) -> dict[str, str]:
    found = re.findall(r"\*UND\*\s+\w+\s+\(?([\w.]*)\)?\s+(\w+)$", output("objdump", "-T", path), re.M)
    return {name: version for version, name in found}


def test_table_is_what_is_exported(build: Build) -> None:
    assert len(hooks()) > 25
    assert exported(build.shim) == hooks() | {"dlsym", "fgpu_admit", "fgpu_release", "fgpu_settle"}


def test_runs_on_glibc_2_17(build: Build) -> None:
    versions = {v for v in needed(build.shim).values() if v.startswith("GLIBC")}
    assert versions
    assert all(tuple(map(int, v[6:].split("."))) <= (2, 17) for v in versions), versions
    libraries = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", build.shim))
    assert libraries == ["libc.so.6"]


@pytest.mark.parametrize(
    "name", ["getenv", "secure_getenv", "exit", "_exit", "abort", "malloc", "calloc", "printf", "puts", "sigaction"]
)
def test_never_calls(build: Build, name: str) -> None:
    assert name not in needed(build.shim)


@pytest.mark.parametrize("name", ["fgpu_admit", "fgpu_release", "fgpu_settle"])
def test_probe_symbols_are_a_nop_and_a_return(build: Build, name: str) -> None:
    text = output("objdump", "-d", f"--disassemble={name}", build.shim)
    code = re.findall(r"^\s+[0-9a-f]+:\t((?:[0-9a-f]{2} )+)", text, re.M)
    assert "".join(code).split() == ["90", "c3"]  # never the five-byte nop: see probe.S


def test_nobody_can_come_between_us_and_our_probes(build: Build) -> None:
    assert "fgpu_admit" not in output("readelf", "-rW", build.shim)


def test_hardened(build: Build) -> None:
    dynamic, segments = output("readelf", "-d", build.shim), output("readelf", "-lW", build.shim)
    assert "BIND_NOW" in dynamic
    assert "NOW" in dynamic
    assert "GNU_RELRO" in segments
    assert not re.search(r"GNU_STACK.*E", segments.split("GNU_STACK")[1].splitlines()[0])
    assert "TEXTREL" not in dynamic


def test_every_hook_is_an_export_of_its_library(build: Build) -> None:
    """Prototypes come from NVIDIA's headers; this finds a name that no header has."""
    headers = (build.headers / "cuda.h").read_text() + (build.headers / "nvml.h").read_text()
    bare = {n: re.sub(r"(_v[234])?(_ptsz)?$", "", n) for n in hooks()}
    missing = {n for n, plain in bare.items() if not re.search(rf"\b{plain}(_v[234])?\b", headers)}
    assert not missing


def test_small(build: Build) -> None:
    """It is mapped into every program of a container."""
    assert sum(int(x) for x in output("size", build.shim).splitlines()[1].split()[:3]) < 112 << 10


def test_sources_stay_readable() -> None:
    for path in (ROOT / "shim").glob("*.[chS]"):
        assert len(path.read_text().splitlines()) <= 400, path
