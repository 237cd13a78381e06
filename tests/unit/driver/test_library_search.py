"""Tests of the search for libcuda in the mappings of a process, under any name."""

from __future__ import annotations

import _ctypes
import ctypes
import errno
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fgpu_ebpf.driver import library_search, probe_plan
from fgpu_ebpf.driver.library_search import Search
from fgpu_ebpf.linux import mapped_files
from tests.unit.root_kit import needs_root

as_root = needs_root("it opens files in /proc/PID/map_files")

HOLD = """
import mmap, os, sys
held = []
for path in sys.argv[1:]:
    if path == "anonymous":
        held.append(mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC))
        continue
    if path.startswith("memfd:"):
        fd = os.memfd_create("x", 0)
        os.write(fd, open(path[6:], "rb").read())
    else:
        fd = os.open(path, os.O_RDONLY)
    held.append(mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC))
    os.close(fd)
print("mapped", flush=True)
sys.stdin.read()
"""
Holder = Callable[..., int]


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Return a function that starts a process which maps these files, and returns its pid."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*paths: str | Path) -> int:
        command = [sys.executable, "-c", HOLD, *map(str, paths)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert started[-1].stdout
        assert started[-1].stdout.readline() == b"mapped\n"
        return started[-1].pid

    yield start
    for process in started:
        process.communicate()


def built(path: Path, names: list[str], *flags: str) -> Path:
    source = path.with_suffix(".c")
    source.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in names))
    subprocess.run(["gcc", "-shared", "-fPIC", *flags, "-o", path, source], check=True, timeout=30)
    return path


def found(search: Search, pid: int) -> set[str]:
    return {os.path.basename(one.path) for one in search.by_contents(pid).files or ()}


@as_root
@pytest.mark.parametrize(
    ("names", "flags", "is_one"),
    [
        (list(probe_plan.REQUIRED), [], True),
        (["cuInit"], ["-Wl,-soname,libcuda.so.1"], True),
        (list(probe_plan.REQUIRED)[1:], [], False),
        (["cuInit"], ["-Wl,-soname,libcudart.so.12"], False),
        (["x"], [], False),
    ],
    ids=["functions", "name", "one is missing", "of the runtime", "another library"],
)
def test_libcuda_is_recognized_by_all_its_functions_or_its_soname(
    tmp_path: Path, holder: Holder, names: list[str], flags: list[str], is_one: bool
) -> None:
    library = built(tmp_path / "x.so", names, *flags)
    pid, search = holder(library), Search(lambda _: False)
    assert found(search, pid) == ({"x.so"} if is_one else set())
    assert search.by_name(pid).files == []


@as_root
@pytest.mark.parametrize("how", ["deleted", "memfd"])
def test_a_file_without_a_path_is_found(tmp_path: Path, holder: Holder, how: str) -> None:
    library = built(tmp_path / "x.so", list(probe_plan.REQUIRED))
    pid = holder(f"memfd:{library}" if how == "memfd" else library)
    library.unlink()
    assert found(Search(lambda _: False), pid) == {"memfd:x" if how == "memfd" else "x.so"}


def test_a_probed_file_is_not_opened(tmp_path: Path, holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "x.so"
    library.write_bytes(bytes(4096))
    pid, file = holder(library), mapped_files.as_mapped(str(library))
    monkeypatch.setattr(mapped_files, "open_regular", lambda *_, **__: pytest.fail("a probed file was opened"))
    monkeypatch.setattr(library_search.procmaps, "each", of_one(library_search.procmaps.each, file))
    assert found(Search(lambda other: other == file), pid) == {"x.so"}


def of_one(real, file):  # type: ignore[no-untyped-def]
    """Return a function like procmaps.each that yields only this file."""
    return lambda maps, which: (one for one in real(maps, which) if (one.dev, one.ino) == file)


@as_root
def test_a_file_that_cannot_be_read_does_not_hide_other_files(
    tmp_path: Path, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable, library = built(tmp_path / "x.so", ["x"]), built(tmp_path / "y.so", list(probe_plan.REQUIRED))
    pid, real = holder(unreadable, library), library_search.is_libcuda

    def is_libcuda(fd: int) -> bool:
        if os.path.sameopenfile(fd, file.fileno()):
            raise OSError(errno.EIO, "input/output error")
        return real(fd)

    monkeypatch.setattr(library_search, "is_libcuda", is_libcuda)
    with unreadable.open("rb") as file:
        assert found(Search(lambda _: False), pid) == {"y.so"}


@as_root
def test_a_file_is_searched_once_while_it_is_unchanged(
    tmp_path: Path, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, looks = built(tmp_path / "x.so", ["x"]), list[int]()
    search, pid = Search(lambda _: False), holder(library)
    search.by_contents(pid)  # examines all files that Python maps
    real = library_search.is_libcuda
    monkeypatch.setattr(library_search, "is_libcuda", lambda fd: looks.append(fd) or real(fd))
    for _ in range(3):
        assert found(search, pid) == set()
    assert not looks
    text = built(tmp_path / "y.so", list(probe_plan.REQUIRED)).read_bytes()
    library.write_bytes(text)  # the same inode, which the process maps
    assert found(search, pid) == {"x.so"}
    assert len(looks) == 1


@as_root
def test_the_number_of_other_recorded_files_is_bounded(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_search, "MOST_REMEMBERED", 3)
    search = Search(lambda _: False)
    search.by_contents(holder())
    assert 0 < len(search._others) <= 3


def test_code_without_a_file_is_reported(holder: Holder) -> None:
    search = Search(lambda _: False)
    assert search.by_contents(holder("anonymous")).code
    with subprocess.Popen(["sleep", "100"]) as plain:  # Python itself may have such code, because of libffi
        while Path(f"/proc/{plain.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.01)
        assert not search.by_contents(plain.pid).code, "the kernel's own pages were taken for code"
        plain.kill()


def test_the_files_of_a_process_that_cannot_be_read_are_unknown() -> None:
    assert Search(lambda _: False).by_contents(1 << 22).files is None
    assert Search(lambda _: False).by_name(1 << 22).files is None


@as_root
def test_a_file_that_is_mapped_several_times_is_found_once(tmp_path: Path) -> None:
    """The library is loaded, and its first page is mapped once more."""
    library = built(tmp_path / "x.so", list(probe_plan.REQUIRED))
    loaded = ctypes.CDLL(str(library))
    with library.open("rb") as file:
        kept = mmap.mmap(file.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        found = [one.path for one in Search(lambda _: False).by_contents(os.getpid()).files or ()]
        assert found.count(str(library)) == 1
        kept.close()
    _ctypes.dlclose(loaded._handle)  # other tests use a gatekeeper in this process, which would count it as a driver
