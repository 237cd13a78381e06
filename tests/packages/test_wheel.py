"""The wheel: its contents, and that it enforces limits from a virtual environment without the system's packages."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import packages as kit


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a plain environment with the wheel, as `uv tool install` and pipx create it."""
    folder = tmp_path_factory.mktemp("environment") / "fgpu"
    kit.run("/usr/bin/python3", "-m", "venv", folder)
    kit.run(folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile", wheel, timeout=170)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def place(environment: Path, driver: None) -> Iterator[kit.Installed]:
    """Install fgpu in that environment."""
    place = kit.Installed(str(environment / "bin/fgpu"))
    kit.STATE.mkdir(exist_ok=True)
    kit.run("mount", "-t", "tmpfs", "tmpfs", kit.STATE)
    yield place
    place.stop()
    kit.run("umount", "--lazy", kit.STATE)  # a removed probe still references its file for a moment


def test_the_tag_states_what_the_shim_requires(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.endswith("-py3-none-manylinux2014_x86_64.whl")
    with zipfile.ZipFile(wheel) as file:
        compiled = [name for name in file.namelist() if name.endswith(".so")]
        assert compiled == ["fgpu_ebpf/shim/libfgpu.so"]
        file.extractall(tmp_path)
        assert "Root-Is-Purelib: false" in file.read(next(n for n in file.namelist() if n.endswith("WHEEL"))).decode()
    shim = tmp_path / compiled[0]
    assert "Advanced Micro Devices X86-64" in kit.run("readelf", "-h", shim).stdout
    assert re.findall(r"NEEDED.*\[(.*)\]", kit.run("readelf", "-d", shim).stdout) == ["libc.so.6"]
    versions = set(re.findall(r"GLIBC_([0-9.]+)", kit.run("readelf", "-V", shim).stdout))
    assert versions
    assert max(tuple(map(int, v.split("."))) for v in versions) <= (2, 17)  # manylinux2014


def test_the_wheel_contains_the_bpf_programs_and_the_shim(wheel: Path) -> None:
    tracked = kit.run("git", "ls-files", "bpf", cwd=kit.ROOT).stdout.split()
    assert len(tracked) > 10
    with zipfile.ZipFile(wheel) as file:
        for name in tracked:
            assert file.read(f"fgpu_ebpf/{name}") == (kit.ROOT / name).read_bytes(), name
        assert file.read("fgpu_ebpf/shim/libfgpu.so") == (kit.BUILD / "shim/libfgpu.so").read_bytes()


def test_nothing_of_the_checkout_is_installed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        tops = {name.split("/")[0].split("-")[0] for name in file.namelist()}
        assert tops == {"fgpu_ebpf"}
        assert not [name for name in file.namelist() if "test" in name or name.endswith(".pyc")]


def test_the_wheel_has_no_failpoints(wheel: Path) -> None:
    """tests/failpoints.py adds the points at which tests kill processes. The installed code has none and reads none."""
    with zipfile.ZipFile(wheel) as file:
        assert [name for name in file.namelist() if b"failpoint" in (name.encode() + file.read(name)).lower()] == []


def test_the_wheel_enforces_limits_without_the_system_s_packages(place: kit.Installed, tmp_path: Path) -> None:
    python = str(Path(place.fgpu).with_name("python"))
    assert kit.run(python, "-c", "import bcc", check=False).returncode, "the environment has the system's packages"
    seconds = place.start_agent(tmp_path / "log")
    kit.assert_enforced(place, "wheel")
    shims = [line for line in Path("/run/fgpu/ld.so.preload").read_text().split() if line.endswith("libfgpu.so")]
    assert shims == [str(kit.STATE / "shim/current/libfgpu.so")]
    (carried,) = Path(python).parents[1].rglob("fgpu_ebpf/shim/libfgpu.so")
    assert Path(shims[0]).read_bytes() == carried.read_bytes()
    place.call("detach")
    assert place.agent is not None
    assert place.agent.wait(30) == 0
    assert not list(Path("/sys/fs/bpf").glob("fgpu/*"))
    assert not Path("/run/fgpu/shim").exists()
    assert not (kit.cgroup2() / "fgpu/wheel").exists()
    print(f"enforcing after {seconds:.2f} s")
