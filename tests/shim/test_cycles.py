"""The shim's files do not depend on each other in a cycle, and use no folders further right in LAYERS."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.shim.shim_kit import ROOT

OBJECTS = ROOT / "build/shim/obj"
LAYERS = re.search(r"^LAYERS := (.+)$", (ROOT / "shim/Makefile").read_text(), re.MULTILINE)[1].split()


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/c_cycles.py", *arguments]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=60)


def compiled(folder: Path, **sources: str) -> Path:
    """Return a folder of object files. `low__a` stands for the source of low/a.o."""
    for name, source in sources.items():
        target = folder / (name.replace("__", "/") + ".o")
        target.parent.mkdir(exist_ok=True)
        subprocess.run(
            ["cc", "-w", "-x", "c", "-c", "-o", target, "-"], input=source, text=True, check=True, timeout=60
        )
    return folder


def test_the_shim_s_files_have_no_cycle_and_use_no_higher_folder() -> None:
    done = check("--layers", ",".join(LAYERS), OBJECTS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_each_source_file_except_libc_has_an_object_file_and_each_folder_is_a_layer() -> None:
    sources = {str(path.relative_to(ROOT / "shim")) for path in (ROOT / "shim").rglob("*.[cS]")} - {"base/libc.S"}
    assert {str(path.relative_to(OBJECTS)) for path in OBJECTS.rglob("*.o")} >= {f"{source}.o" for source in sources}
    assert {source.split("/")[0] for source in sources} == set(LAYERS)


def test_the_check_finds_a_cycle(tmp_path: Path) -> None:
    objects = compiled(tmp_path, low__a="int b(); int a() { return b(); }", low__b="int a(); int b() { return a(); }")
    done = check(objects)
    assert done.returncode == 1
    assert "cycle of 2 files: low/a low/b\n  low/a -> low/b: b\n  low/b -> low/a: a\n" in done.stdout


def test_the_check_finds_a_use_of_a_higher_folder_and_a_folder_without_a_layer(tmp_path: Path) -> None:
    objects = compiled(tmp_path, low__a="int b(); int a() { return b(); }", high__b="int b() { return 1; }")
    assert check("--layers", "high,low", objects).returncode == 0
    done = check("--layers", "low,high", objects)
    assert done.returncode == 1
    assert "low/a uses high/b, of a higher layer: b\n" in done.stdout
    assert "high/b: in none of the layers low\n" in check("--layers", "low", objects).stdout
