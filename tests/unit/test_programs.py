"""The loader as the agent sees it: at work beside the rest of a start, named when it fails, ended when nobody waits."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from fgpu_ebpf.driver import programs
from fgpu_ebpf.driver.programs import Loading, ProgramError


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders of sources and of pins, the latter no bpffs."""
    monkeypatch.setattr(programs, "mount_bpffs", lambda pins: pins.mkdir(exist_ok=True))
    sources = tmp_path / "bpf"
    sources.mkdir()
    (sources / "fgpu.h").write_text("int one;")
    return sources, tmp_path / "pins"


def shell(text: str) -> tuple[str, ...]:
    """A loader that is a shell script; what it is given comes behind."""
    return "/bin/sh", "-c", text, "loader"


def test_loads_once(places: tuple[Path, Path], tmp_path: Path) -> None:
    sources, pins = places
    loader = shell(f"echo once >>{tmp_path}/runs")
    digests = set()
    for first in (True, False):
        loading = Loading(sources, pins, loader)
        assert loading.begun is first
        digests.add(loading.wait())
    assert (tmp_path / "runs").read_text() == "once\n"
    assert [path.name for path in pins.iterdir()] == [f"loaded-{digests.pop()}"]
    (sources / "fgpu.h").write_text("int two;")
    assert programs.load(sources, pins, loader) not in digests
    assert len(list(pins.iterdir())) == 1, "the stamp of the older programs is gone"


def test_says_why_there_are_no_programs(places: tuple[Path, Path]) -> None:
    with pytest.raises(ProgramError, match=r"^no BCC here$"):
        programs.load(*places, shell("echo one; echo warning >&2; echo 'fgpu loader: no BCC here' >&2; exit 1"))
    with pytest.raises(ProgramError, match="exited with 3"):
        programs.load(*places, shell("exit 3"))
    with pytest.raises(ProgramError, match="cannot run the loader /no/such"):
        programs.load(*places, ("/no/such",))
    assert not list(places[1].iterdir())


def test_is_ended_when_nobody_waits(places: tuple[Path, Path], tmp_path: Path) -> None:
    loading = Loading(*places, shell(f"echo $$ >{tmp_path}/pid; exec sleep 60"))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    loading.end()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not list(places[1].iterdir())
    assert Loading(*places, shell("true")).begun


@pytest.mark.parametrize(("seconds", "watched"), [(0.6, True), (0.6, False), (0, True)])
def test_somebody_who_waits_is_told_what_for(
    places: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds: float,
    watched: bool,
) -> None:
    monkeypatch.setattr(programs, "SOON_SECONDS", 0.3)
    monkeypatch.setattr(programs.os, "isatty", lambda _: watched)
    monkeypatch.setattr(programs.sys, "stderr", sys.__stderr__)
    caplog.set_level("INFO")
    Loading(*places, shell(f"sleep {seconds}")).wait()
    assert ("compiling" in caplog.text) is (bool(seconds) and watched)
