"""Tests of the compiler process: it runs during the rest of a start, and its errors are reported.

It is killed when no start waits for it. Its output is stored for the next start.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from fgpu_ebpf.driver import image, programs
from fgpu_ebpf.driver.programs import Loading, ProgramError

PRINTED = '{"maps": {"host": [2, 4, 8, 9, 0]}, "programs": {"admit": "9500000000000000"}}'


class World(NamedTuple):
    """The folders of a host, and the images that are loaded there."""

    sources: Path
    pins: Path
    cache: Path
    loaded: list[image.Image]

    def loading(self, loader: Sequence[str]) -> Loading:
        return Loading(self.sources, self.pins, loader, self.cache)

    def load(self, loader: Sequence[str]) -> str:
        return programs.load(self.sources, self.pins, loader, self.cache)

    def boot(self) -> None:
        """Remove all pins, as a boot does."""
        shutil.rmtree(self.pins)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(programs, "mount_bpffs", lambda pins: pins.mkdir(exist_ok=True))
    loaded: list[image.Image] = []
    monkeypatch.setattr(image, "load", lambda image, pins: loaded.append(image))
    sources = tmp_path / "bpf"
    sources.mkdir()
    (sources / "fgpu.h").write_text("int one;")
    return World(sources, tmp_path / "pins", tmp_path / "cache", loaded)


def shell(text: str) -> tuple[str, ...]:
    """Return a compiler that is a shell script. Its arguments follow the script."""
    return "/bin/sh", "-c", text, "compiler"


@pytest.fixture
def compiler(tmp_path: Path) -> tuple[str, ...]:
    """Return a compiler that counts its runs."""
    return shell(f"echo once >>{tmp_path}/runs; echo '{PRINTED}'")


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def test_pinned_programs_are_loaded_again_only_after_a_change_of_the_sources(
    world: World, compiler: tuple[str, ...], tmp_path: Path
) -> None:
    digests = set()
    for first in (True, False):
        loading = world.loading(compiler)
        assert loading.begun is first
        digests.add(loading.wait())
    assert runs(tmp_path) == 1
    assert world.loaded == [image.parsed(PRINTED)]
    assert [path.name for path in world.pins.iterdir()] == [f"loaded-{digests.pop()}"]
    (world.sources / "fgpu.h").write_text("int two;")
    assert world.load(compiler) not in digests
    assert len(list(world.pins.iterdir())) == 1, "the stamp of the older programs was kept"
    assert runs(tmp_path) == 2


def test_programs_that_were_replaced_in_part_are_not_taken_for_the_older_ones(
    world: World, compiler: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An administrator goes back to the older version after the start of the newer one has failed."""
    world.load(compiler)
    (world.sources / "fgpu.h").write_text("int two;")

    def fails(image: image.Image, pins: Path) -> None:
        raise ProgramError("no memory")

    monkeypatch.setattr(image, "load", fails)
    with pytest.raises(ProgramError, match="no memory"):
        world.load(compiler)
    (world.sources / "fgpu.h").write_text("int one;")
    assert world.loading(compiler).begun


def test_a_start_after_a_boot_compiles_nothing(world: World, compiler: tuple[str, ...], tmp_path: Path) -> None:
    for _ in range(2):
        world.load(compiler)
        world.boot()
    assert runs(tmp_path) == 1
    assert world.loaded == 2 * [image.parsed(PRINTED)]


@pytest.mark.parametrize("damage", [b"", b"\0", b"0" * 65 + PRINTED.encode(), PRINTED.encode(), b"\xff"])
def test_a_damaged_file_of_the_cache_is_replaced(
    world: World, compiler: tuple[str, ...], tmp_path: Path, damage: bytes
) -> None:
    world.load(compiler)
    (file,) = world.cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    world.boot()
    world.load(compiler)
    assert runs(tmp_path) == 2
    assert file.read_bytes() == whole


def test_another_kernel_needs_a_new_compilation(
    world: World, compiler: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.load(compiler)
    world.boot()
    uname = os.uname()
    other = os.uname_result((uname.sysname, uname.nodename, uname.release, uname.version + "x", uname.machine))
    monkeypatch.setattr(programs.os, "uname", lambda: other)
    world.load(compiler)
    assert runs(tmp_path) == 2


def test_the_cache_is_bounded(world: World) -> None:
    for number in range(programs.MOST_CACHED + 2):
        world.load(shell(f"echo '{PRINTED}'; : {number}"))
        world.boot()
        time.sleep(0.01)  # time stamps of files have the resolution of the kernel's tick
    assert len(list(world.cache.iterdir())) == programs.MOST_CACHED


def test_the_cache_keeps_used_files(world: World, compiler: tuple[str, ...], tmp_path: Path) -> None:
    for number in range(2 * programs.MOST_CACHED):
        world.load(compiler)
        world.boot()
        time.sleep(0.01)
        world.load(shell(f"echo '{PRINTED}'; : {number}"))
        world.boot()
        time.sleep(0.01)
    assert runs(tmp_path) == 1


def test_programs_are_compiled_without_a_cache(world: World, compiler: tuple[str, ...], tmp_path: Path) -> None:
    world.cache.write_text("no folder")
    for _ in range(2):
        world.load(compiler)
        world.boot()
    assert runs(tmp_path) == 2


def test_the_error_gives_the_reason_for_missing_programs(world: World) -> None:
    with pytest.raises(ProgramError, match=r"^no BCC here$"):
        world.load(shell("echo one; echo warning >&2; echo 'fgpu compiler: no BCC here' >&2; exit 1"))
    with pytest.raises(ProgramError, match="exited with 3"):
        world.load(shell("exit 3"))
    with pytest.raises(ProgramError, match="cannot run the compiler /no/such"):
        world.load(("/no/such",))
    for printed in ("", "[]", '{"maps": {}}', '{"maps": {"a": [1]}, "programs": {}}'):
        with pytest.raises(ProgramError, match="printed invalid output"):
            world.load(shell(f"echo '{printed}'"))
    assert not list(world.pins.iterdir())
    assert not world.cache.exists()


def test_the_compiler_is_killed_when_its_loading_is_ended(world: World, tmp_path: Path) -> None:
    loading = world.loading(shell(f"echo $$ >{tmp_path}/pid; exec sleep 60"))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    loading.end()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not list(world.pins.iterdir())
    assert world.loading(shell("true")).begun


@pytest.mark.parametrize(("seconds", "watched"), [(0.6, True), (0.6, False), (0, True)])
def test_a_slow_compilation_is_logged_only_on_a_terminal(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seconds: float, watched: bool
) -> None:
    monkeypatch.setattr(programs, "SOON_SECONDS", 0.3)
    monkeypatch.setattr(programs.os, "isatty", lambda _: watched)
    monkeypatch.setattr(programs.sys, "stderr", sys.__stderr__)
    caplog.set_level("INFO")
    world.load(shell(f"sleep {seconds}; echo '{PRINTED}'"))
    assert ("compiling" in caplog.text) is (bool(seconds) and watched)
