"""Tests of the files of the built libraries: the properties that probes rely on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from .conftest import HEADERS, ROOT

LIBRARIES = {"libcuda.so.1": "cu", "libnvidia-ml.so.1": "nvml"}
CALL = re.compile(r"\t(?:call|jmp)\s+[0-9a-f]+ <([A-Za-z0-9_]+)(?:@plt)?>")


def disassemble(library: Path) -> dict[str, list[str]]:
    text = subprocess.run(["objdump", "-d", library], check=True, capture_output=True, text=True).stdout
    functions: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        if start := re.fullmatch(r"[0-9a-f]+ <(\w+)>:", line):
            body = functions.setdefault(start[1], [])
        elif line.startswith(" "):
            body.append(line)
    return functions


def exports(library: Path) -> list[str]:
    text = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    return [line.split()[2] for line in text.splitlines()]


@pytest.mark.parametrize(("library", "prefix"), LIBRARIES.items())
def test_the_libraries_export_only_the_public_names(tools: Path, library: str, prefix: str) -> None:
    names = exports(tools / "lib" / library)
    assert len(names) > 80
    assert [name for name in names if not re.match(prefix + "[A-Z]", name)] == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_export_begins_with_push_rbp(tools: Path, library: str) -> None:
    code = disassemble(tools / "lib" / library)
    first = {name: code[name][0] for name in exports(tools / "lib" / library)}
    assert {name: line for name, line in first.items() if line.split("\t")[1].strip() != "55"} == {}


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_export_is_called_from_inside(tools: Path, library: str) -> None:
    """A probe on an export would count such a call as the program's own."""
    public = set(exports(tools / "lib" / library))
    code = disassemble(tools / "lib" / library)
    calls = {(name, call[1]) for name, body in code.items() for line in body if (call := CALL.search(line))}
    assert {(name, called) for name, called in calls if called in public and called != name} == set()


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_export_returns_by_itself(tools: Path, library: str) -> None:
    """A jump out of an export would leave the function without the return that a return probe waits for."""
    public = set(exports(tools / "lib" / library))
    code = disassemble(tools / "lib" / library)
    assert [name for name in sorted(public) if not any("\tret" in line for line in code[name])] == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_libraries_have_the_real_sonames(tools: Path, library: str) -> None:
    text = subprocess.run(["readelf", "-d", tools / "lib" / library], check=True, capture_output=True, text=True)
    assert f"Library soname: [{library}]" in text.stdout
    assert (tools / "lib" / library.removesuffix(".1")).resolve() == (tools / "lib" / library).resolve()


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_libraries_are_hardened(tools: Path, library: str) -> None:
    command = ["readelf", "-dlW", tools / "lib" / library]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "BIND_NOW" in text
    assert "GNU_RELRO" in text
    assert "TEXTREL" not in text
    assert not re.search(r"GNU_STACK.*E", text)


def table() -> list[tuple[str, int, str]]:
    text = (ROOT / "sim" / "cuda" / "data" / "symbols.h").read_text()
    rows = re.findall(r"^(?:LEGACY|BOTH|EACH)\((\w+), (\d+), (\w+)", text, re.M)
    return [(name, int(version), symbol) for name, version, symbol in rows]


def test_the_lookup_table_has_the_newest_version_of_each_function_and_no_unknown_one(tools: Path) -> None:
    """The versions are those of cudaTypedefs.h. Functions that the table does not have are not compared."""
    text = (HEADERS / "cudaTypedefs.h").read_text()
    pairs = {(name, int(v)) for name, v in re.findall(r"\*PFN_(cu\w+?)_v(\d{4,5})(?:_pt[ds][sz])?\)", text)}
    rows = table()
    assert {(name, version) for name, version, _ in rows} <= pairs
    ours = {name: symbol for name, _, symbol in rows}
    versions: dict[str, set[int]] = {}
    for name, version in pairs:
        versions.setdefault(name, set()).add(version)
    newest = {name: max(v for n, v, _ in rows if n == name) for name in ours}
    # A later version in the header may only be 7000, the per-thread form of the same export.
    assert {n: max(versions[n]) for n in ours if max(versions[n]) > newest[n] and max(versions[n]) != 7000} == {}


def test_every_exported_cuda_function_can_be_looked_up(tools: Path) -> None:
    text = (ROOT / "sim" / "cuda" / "data" / "symbols.h").read_text()
    symbols = set(re.findall(r"\b(cu\w+)\b", text))
    assert set(exports(tools / "lib" / "libcuda.so.1")) - symbols == set()
