"""The driver's files: which files a host has, and whether they still exist."""

from __future__ import annotations

import os
from pathlib import Path

from fgpu_ebpf.driver.library_files import driver_files, file_at


def test_the_files_of_a_driver_are_the_targets_of_its_links(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib64"
    folder.mkdir(parents=True)
    (folder / "libcuda.so.580").touch()
    (folder / "libcuda.so.1").symlink_to("libcuda.so.580")
    found = driver_files(tmp_path)
    at = os.stat(folder / "libcuda.so.580")
    assert found == {folder / "libcuda.so.1": (at.st_dev, at.st_ino)}
    (folder / "libcuda.so.590").touch()
    (folder / "libcuda.so.1").unlink()
    assert file_at(folder / "libcuda.so.1") is None
    (folder / "libcuda.so.1").symlink_to("libcuda.so.590")
    assert file_at(folder / "libcuda.so.1") not in (None, found[folder / "libcuda.so.1"])


def test_a_removed_file_that_a_mount_still_shows_is_not_used(tmp_path: Path) -> None:
    """A container's mount shows the file after the host has removed it."""
    path = tmp_path / "libcuda.so.1"
    with path.open("w") as file:
        shown = Path(f"/proc/self/fd/{file.fileno()}")
        assert file_at(shown) == file_at(path) is not None
        path.unlink()
        assert file_at(shown) is None
