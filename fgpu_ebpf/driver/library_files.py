"""Files of libcuda and the shim: their paths on a host, and functions that open a file that a process maps.

An opened file is compared with the mapping, because another file may have replaced the mapped file, and because a path
that a container has chosen may lead to another file of the host. Such a path is resolved inside one root folder,
without links. This module runs in the agent's main thread and worker threads, and in `fgpu doctor`. Errors are OSError.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.linux import mapped_files, openat2
from fgpu_ebpf.linux.procmaps import File

LIBRARY_FOLDERS = (
    "usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "lib64", "lib", ".",
    "usr/local/nvidia/lib64", "usr/local/nvidia/lib", "usr/lib/wsl/lib", "usr/local/cuda/compat",
)  # fmt: skip


class Target(NamedTuple):
    """A file to probe.

    `way`: the path by which the agent opens the file. (`dev`, `ino`): the file's numbers in /proc/PID/maps. `path`: the
    file's name in messages. `pinned`: whether the file's links outlive the agent. Links to a file in a container's
    layer do not outlive the agent, because such links would keep the mount busy.
    """

    path: str
    dev: int
    ino: int
    pinned: bool
    way: str
    through: bool = False  # `way` is a link in /proc, which is followed
    root: str = ""  # the root in which `way` is resolved, without links; empty: no container has chosen `way`

    @classmethod
    def of(cls, path: str) -> Target:
        """Return the target for one of the host's own files. Raise OSError on failure."""
        place = os.path.realpath(path)
        return cls(place, *mapped_files.as_mapped(place), True, place)

    def open(self) -> int:
        """Open exactly this file, and return the descriptor. Raise OSError, with ESTALE if the file was replaced."""
        fd = self._open()
        try:
            if mapped_files.mapped_as(fd) != (self.dev, self.ino):
                raise OSError(errno.ESTALE, "another file has replaced this file")
        except OSError:
            os.close(fd)
            raise
        return fd

    def _open(self) -> int:
        if not self.root:
            return mapped_files.open_regular(self.way, self.through)
        place = openat2.find_mapped(self.root, self.way)
        try:
            return mapped_files.open_regular(f"/proc/self/fd/{place}", follow=True)
        finally:
            os.close(place)


# -- finding -------------------------------------------------------------------------------------------------------


def driver_libraries(root: Path, name: str) -> list[Path]:
    """Return all files of this name in the library folders of a driver root, without duplicates.

    If the root is /, the files in the loader's cache come first.
    """
    found: dict[Path, None] = {}
    for path in _candidates(root, name):
        with contextlib.suppress(OSError):
            found.setdefault(path.resolve(strict=True))
    return list(found)


def _candidates(root: Path, name: str) -> list[Path]:
    candidates = [root / folder / name for folder in LIBRARY_FOLDERS]
    return _cached_libraries(name) + candidates if root == Path("/") else candidates


def driver_files(root: Path) -> dict[Path, tuple[int, int] | None]:
    """Return the paths at which a driver root has its libraries now, each with the (dev, ino) of its file."""
    paths = [path for name in ("libcuda.so.1", "libnvidia-ml.so.1") for path in _candidates(root, name)]
    return {path: file for path in paths if (file := file_at(path))}


def file_at(path: Path) -> tuple[int, int] | None:
    """Return (dev, ino) of the file at a path, by os.stat(); None: no file exists, or a mount shows a removed file."""
    try:
        at = path.stat()
    except OSError:
        return None
    return (at.st_dev, at.st_ino) if at.st_nlink else None


def _cached_libraries(name: str) -> list[Path]:
    return [Path(line.split(" => ")[1]) for line in _loader_cache() if line.split(" ")[0].strip() == name]


@functools.cache
def _loader_cache() -> list[str]:
    command = ["/sbin/ldconfig", "-p"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False, env={})
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()


def target_of(pid: int, mapped: mapped_files.MappedFile, versions: Mapping[File, str]) -> Target:
    """Return the target for a file that a process maps. Raise OSError if the file cannot be opened.

    The process determines its paths, so each path is tried, and the opened file is compared with the mapping. The path
    in map_files is a link of the kernel to the mapped file. `versions`: the host's paths of the shims in the store.
    Their path in a container is not the host's path, and their links have to outlive the agent.
    """
    stored = versions.get((mapped.dev, mapped.ino), mapped.path)
    ways = (
        Target(mapped.path, mapped.dev, mapped.ino, True, stored, root="/"),
        Target(mapped.path, mapped.dev, mapped.ino, False, f"/proc/{pid}/map_files/{mapped.place}", True),
        Target(mapped.path, mapped.dev, mapped.ino, False, mapped.path, root=f"/proc/{pid}/root"),
    )
    for target in ways[:-1]:
        with contextlib.suppress(OSError):
            os.close(target.open())
            return target
    os.close(ways[-1].open())
    return ways[-1]
