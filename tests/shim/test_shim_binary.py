"""Tests of the built file: the symbols that it needs and exports, and the bytes that the kernel depends on."""

import platform
import re
import subprocess
from pathlib import Path

import pytest

from tests.shim.shim_kit import PREAMBLE, ROOT, SYSTEM_PYTHON, Agent, Build


def output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, timeout=20).stdout


def hooks() -> set[str]:
    """Return the names of the table in the source."""
    return set(re.findall(r"\bHOOK\((\w+)\)", (ROOT / "shim/core/hook_table.h").read_text()))


def exported(path: Path) -> set[str]:
    return {line.split()[-1] for line in output("nm", "-D", "--defined-only", path).splitlines()}


def needed(path: Path) -> dict[str, str]:
    found = re.findall(r"\*UND\*\s+\w+\s+\(?([\w.]*)\)?\s+(\w+)$", output("objdump", "-T", path), re.M)
    return {name: version for version, name in found}


def test_the_shim_exports_exactly_its_hooks_dlopen_dlsym_and_the_probe_symbols(build: Build) -> None:
    assert len(hooks()) > 25
    assert exported(build.shim) == hooks() | {"dlopen", "dlsym", "fgpu_admit", "fgpu_release"}


def test_the_shim_requires_only_libc_and_symbols_that_every_glibc_has(build: Build) -> None:
    """Symbols have the first version for this machine.

    Symbols that moved into libc later are weak, without a version.
    """
    oldest = {"x86_64": "GLIBC_2.2.5", "aarch64": "GLIBC_2.17"}[platform.machine()]
    moved = {"__libc_dlopen_mode", "__libc_dlsym", "clock_gettime", "dlclose", "dlerror", "dlvsym"}
    versions = needed(build.shim)
    assert {name for name, version in versions.items() if version != oldest} == moved, versions
    weak = set(re.findall(r"^ +w (\S+)$", output("nm", "-D", "--undefined-only", build.shim), re.M))
    assert weak == moved
    libraries = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", build.shim))
    assert libraries == ["libc.so.6"]


# What the dynamic loader of glibc 2.17 understands, of that which linkers write. For example, RELR needs 2.36.
TAGS = {
    "FLAGS", "FLAGS_1", "GNU_HASH", "HASH", "INIT_ARRAY", "INIT_ARRAYSZ", "JMPREL", "NEEDED", "NULL", "PLTGOT",
    "PLTREL", "PLTRELSZ", "RELA", "RELACOUNT", "RELAENT", "RELASZ", "SONAME", "STRSZ", "STRTAB", "SYMBOLIC", "SYMENT",
    "SYMTAB", "VERNEED", "VERNEEDNUM", "VERSYM",
}  # fmt: skip
RELOCATIONS = {
    "x86_64": {"R_X86_64_64", "R_X86_64_GLOB_DAT", "R_X86_64_JUMP_SLOT", "R_X86_64_RELATIVE", "R_X86_64_TPOFF64"},
    "aarch64": {f"R_AARCH64_{name}" for name in ("ABS64", "GLOB_DAT", "JUMP_SLOT", "RELATIVE", "TLS_TPREL", "TLSDESC")},
}


def test_the_loader_of_glibc_2_17_understands_the_shim(build: Build) -> None:
    tags = set(re.findall(r"^ 0x[0-9a-f]+ \((\w+)\)", output("readelf", "-d", build.shim), re.M))
    assert {"GNU_HASH", "VERNEED"} <= tags <= TAGS
    relocations = set(re.findall(r"\b(R_[A-Z0-9]+_\w+)", output("readelf", "-rW", build.shim)))
    assert relocations
    assert relocations <= RELOCATIONS[platform.machine()]
    assert re.search(r"OS/ABI: +UNIX - System V$", output("readelf", "-h", build.shim), re.M)
    assert "IFUNC" not in output("readelf", "--dyn-syms", "-W", build.shim)


def test_the_shim_imports_the_same_symbols_with_a_hardening_compiler(build: Build, tmp_path: Path) -> None:
    hardened = build.make(tmp_path, "CFLAGS=-O2 -fstack-protector-strong -D_FORTIFY_SOURCE=3", "-j2")
    assert needed(hardened) == needed(build.shim)


def test_the_shim_s_clock_works_without_clock_gettime_in_libc(build: Build, held: Agent, tmp_path: Path) -> None:
    """A program with a glibc before 2.17 has no clock_gettime unless it loads librt."""
    lacking = tmp_path / "libfgpu.so"
    lacking.write_bytes(build.shim.read_bytes().replace(b"\0clock_gettime\0", b"\0clock_gettimX\0"))
    assert "clock_gettimX" in output("nm", "-D", lacking)
    held.do("stop")
    script = "begun = time.monotonic(); print(alloc(MiB), 4.5 < time.monotonic() - begun < 7)"
    said, _ = held.run(SYSTEM_PYTHON, "-c", PREAMBLE + script, libraries=(lacking,))
    assert said == "2 True\n", "without an answer, its deadline of 5 s passes"


@pytest.mark.parametrize(
    "name", ["getenv", "secure_getenv", "exit", "_exit", "abort", "malloc", "calloc", "printf", "puts", "sigaction"]
)
def test_the_shim_imports_no_forbidden_function(build: Build, name: str) -> None:
    assert name not in needed(build.shim)


@pytest.mark.parametrize("name", ["fgpu_admit", "fgpu_release"])
def test_probe_symbols_are_a_nop_and_a_return(build: Build, name: str) -> None:
    text = output("objdump", "-d", f"--disassemble={name}", build.shim)
    code = re.findall(r"^\s+[0-9a-f]+:\t((?:[0-9a-f]{2} )+)", text, re.M)
    assert "".join(code).split() == ["90", "c3"]  # never the five-byte no-operation: see probe.S


def test_no_relocation_lets_a_library_interpose_fgpu_admit(build: Build) -> None:
    assert "fgpu_admit" not in output("readelf", "-rW", build.shim)


def test_the_shim_is_hardened(build: Build) -> None:
    dynamic, segments = output("readelf", "-d", build.shim), output("readelf", "-lW", build.shim)
    assert "BIND_NOW" in dynamic
    assert "NOW" in dynamic
    assert "GNU_RELRO" in segments
    assert not re.search(r"GNU_STACK.*E", segments.split("GNU_STACK")[1].splitlines()[0])
    assert "TEXTREL" not in dynamic


def test_a_header_declares_each_hook(build: Build) -> None:
    """Prototypes come from NVIDIA's headers; this finds a name that no header has."""
    lists = [build.headers / "cuda.h", build.headers / "nvml.h", *(ROOT / "shim/symbols").glob("*-header-*.txt")]
    headers = "".join(path.read_text() for path in lists)
    bare = {n: re.sub(r"(_v[234])?(_ptsz)?$", "", n) for n in hooks()}
    missing = {n for n, plain in bare.items() if not re.search(rf"\b{plain}(_v[234])?\b", headers)}
    assert not missing


def test_the_shim_s_sections_occupy_less_than_128_kib(build: Build) -> None:
    """The shim is small, because it is mapped into every program of a container."""
    assert sum(int(x) for x in output("size", build.shim).splitlines()[1].split()[:3]) < 128 << 10


def test_source_files_of_the_shim_have_at_most_400_lines() -> None:
    for path in (ROOT / "shim").rglob("*.[chS]"):
        assert len(path.read_text().splitlines()) <= 400, path
