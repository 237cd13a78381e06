"""Tests of the search for libraries in a root that is not the host's, and of the files that the search never opens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fgpu_ebpf.driver import root_scan
from fgpu_ebpf.driver.library_files import target_of
from fgpu_ebpf.driver.root_scan import Roots
from fgpu_ebpf.linux import mapped_files, openat2
from tests.unit.root_kit import needs_root

Dweller = Callable[[Path], int]
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
NEW = CLONE_NEWNS | (CLONE_NEWUSER if os.geteuid() else 0)  # in its own user namespace a user may call chroot()


@pytest.fixture
def dweller() -> Iterator[Dweller]:
    """Return a function that starts processes with this folder as their root, in their own mount namespaces."""
    started: list[int] = []

    def start(folder: Path) -> int:
        told, tell = os.pipe()
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                assert ctypes.CDLL(None).unshare(NEW) == 0
                os.chroot(folder)
                os.write(tell, b"there")
                signal.pause()
            os._exit(1)
        started.append(pid)
        os.close(tell)
        assert os.read(told, 5) == b"there"
        os.close(told)
        return pid

    yield start
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def library(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a libcuda")
    return path


def found(pid: int) -> dict[str, tuple[int, int]]:
    return {target.path: (target.dev, target.ino) for target in root_scan.libraries(pid)}


def test_files_are_found_on_a_loader_s_paths_through_links_inside_the_root(tmp_path: Path, dweller: Dweller) -> None:
    """The links are those of an image with CUDA: /usr/local/cuda, /etc/alternatives/cuda, /usr/local/cuda-12."""
    real = library(tmp_path / "usr/local/cuda-12/compat/libcuda.so.550.1")
    real.with_name("libcuda.so.1").symlink_to("libcuda.so.550.1")
    (tmp_path / "etc/alternatives").mkdir(parents=True)
    (tmp_path / "etc/alternatives/cuda").symlink_to("/usr/local/cuda-12")
    (tmp_path / "usr/local/cuda").symlink_to("/etc/alternatives/cuda")
    assert found(dweller(tmp_path)) == {"/usr/local/cuda/compat/libcuda.so.1": mapped_files.as_mapped(str(real))}


@needs_root("it mounts a folder")
def test_no_file_outside_the_root_is_found(tmp_path: Path, dweller: Dweller) -> None:
    root, outside = tmp_path / "root", library(tmp_path / "outside/libcuda.so.1")
    for folder in ("usr/lib", "usr/lib64", "lib", "lib64"):
        (root / folder).mkdir(parents=True)
    (root / "usr/lib/libcuda.so.1").symlink_to(f"../../../../../../../../../..{outside}")
    os.mkfifo(root / "lib/libcuda.so.1")
    (root / "libcuda.so.1").symlink_to("/proc/1/root/etc/passwd")
    subprocess.run(["mount", "--bind", outside.parent, root / "lib64"], check=True)
    try:
        assert (root / "lib64/libcuda.so.1").exists()
        assert found(dweller(root)) == {}
        library(root / "usr/lib64/libcuda.so.1")
        assert list(found(dweller(root))) == ["/usr/lib64/libcuda.so.1"]
    finally:
        subprocess.run(["umount", "--lazy", root / "lib64"], check=True)


def test_every_root_is_searched_once_and_the_host_s_never(tmp_path: Path, dweller: Dweller) -> None:
    seen, first = Roots(), root_scan.root_of(dweller(tmp_path))
    here = root_scan.root_of(os.getpid())
    assert here in seen
    assert root_scan.root_of(1 << 22) is None, "no process has this pid"
    assert first not in seen
    seen.enter(first)
    assert first in seen
    other = root_scan.root_of(dweller(tmp_path))
    assert other not in seen, "another container's root counts as searched"
    assert other != first


def test_a_process_in_the_root_of_a_found_file_is_returned_until_the_file_is_forgotten(
    tmp_path: Path, dweller: Dweller
) -> None:
    seen, pid = Roots(), dweller(tmp_path)
    root = root_scan.root_of(pid)
    assert root
    seen.enter(root)
    seen.found((1, 23), root)
    assert seen.processes_inside({(1, 23), (1, 24)}, [os.getpid(), pid]) == {(1, 23): pid}
    assert seen.processes_inside({(1, 23)}, [os.getpid()]) == {}
    seen.forget((1, 23))
    assert seen.processes_inside({(1, 23)}, [pid]) == {}
    assert root not in seen, "the root of a forgotten file was kept"


def test_the_root_that_was_entered_longest_ago_is_forgotten_beyond_the_maximum(
    tmp_path: Path, dweller: Dweller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(root_scan, "MOST_ROOTS", 2)
    seen, pids = Roots(), [dweller(tmp_path) for _ in range(3)]
    places = [root_scan.root_of(pid) for pid in pids]
    for n, root in enumerate(places):
        assert root
        seen.enter(root)
        seen.found((1, n), root)
    assert [root in seen for root in places] == [False, True, True], "the oldest root was kept"
    assert seen.processes_inside({(1, n) for n in range(3)}, pids) == {(1, 1): pids[1], (1, 2): pids[2]}
    seen.enter(places[1])  # type: ignore[arg-type]
    seen.enter(places[0])  # type: ignore[arg-type]
    assert [root in seen for root in places] == [True, True, False], "a root that was entered again was forgotten"


@pytest.mark.parametrize("link", ["/etc", "../" * 20 + "etc"])
def test_a_path_in_a_root_never_leads_to_a_file_of_the_host(tmp_path: Path, dweller: Dweller, link: str) -> None:
    """The path that the kernel showed is a link now. No file behind it is opened, in particular none of the host."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/passwd").write_text("its own")
    (tmp_path / "way").symlink_to(link)
    root = f"/proc/{dweller(tmp_path)}/root"
    assert os.stat(f"{root}/way/passwd").st_ino == os.stat("/etc/passwd").st_ino, "the link leads elsewhere"
    for inside in ("/way/passwd", "way/passwd"):
        with pytest.raises(OSError, match="symbolic links"):
            openat2.find_mapped(root, inside)
    found = openat2.find_mapped(root, "/own/passwd")
    assert os.stat(found).st_ino == (tmp_path / "own/passwd").stat().st_ino
    os.close(found)


def test_a_mapped_file_is_not_searched_behind_a_link(tmp_path: Path, dweller: Dweller) -> None:
    """The file has no entry in map_files, so the only path to it leads through the root of the process.

    A link in that root is not followed to a file of the host.
    """
    (tmp_path / "way").symlink_to("/etc")
    pid, here = dweller(tmp_path), mapped_files.as_mapped("/etc/passwd")
    with pytest.raises(OSError, match=r"symbolic links|No such file"):
        target_of(pid, mapped_files.MappedFile("/way/passwd", *here, "0-0"), {})
