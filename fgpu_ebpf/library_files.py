"""Files of libcuda and the shim: where a host has them, and how a file that a process maps is opened from here.

Never: opens another file than the one that was named, whatever has been put in its place since; follows a path that a
container has chosen to a file of the host's. Raises OSError.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf import innerpath, procfs

LIBRARY_FOLDERS = (
    "usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "lib64", "lib", ".",
    "usr/local/nvidia/lib64", "usr/local/nvidia/lib", "usr/lib/wsl/lib", "usr/local/cuda/compat",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A file to probe: `way` opens it from here; (dev, ino) is how /proc/PID/maps names it, and `path` how people do.

    `pinned`: its links outlive the agent; a file in a container's own layer would keep its mount busy by them.
    """

    path: str
    dev: int
    ino: int
    pinned: bool
    way: str
    through: bool = False  # `way` is a link of the kernel's own
    root: str = ""  # where `way` begins, with no link on it; empty: no container has chosen it

    @classmethod
    def of(cls, path: str) -> Target:
        """A file of the host's own."""
        place = os.path.realpath(path)
        return cls(place, *procfs.as_mapped(place), True, place)

    def open(self) -> int:
        """A descriptor of this very file, whatever has been put in its place meanwhile. Raises OSError."""
        fd = self._open()
        try:
            if procfs.mapped_as(fd) != (self.dev, self.ino):
                raise OSError(errno.ESTALE, "another file is in its place")
        except OSError:
            os.close(fd)
            raise
        return fd

    def _open(self) -> int:
        if not self.root:
            return procfs.open_regular(self.way, self.through)
        place = innerpath.find_mapped(self.root, self.way)
        try:
            return procfs.open_regular(f"/proc/self/fd/{place}", follow=True)
        finally:
            os.close(place)


# -- finding -------------------------------------------------------------------------------------------------------


def driver_libraries(root: Path, name: str) -> list[Path]:
    """Every file of this name in a driver root's library folders, each once; the loader's cache comes first for /."""
    candidates = [root / folder / name for folder in LIBRARY_FOLDERS]
    if root == Path("/"):
        candidates = _cached_libraries(name) + candidates
    found: dict[Path, None] = {}
    for path in candidates:
        with contextlib.suppress(OSError):
            found.setdefault(path.resolve(strict=True))
    return list(found)


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


def target_of(pid: int, mapped: procfs.Mapping) -> Target:
    """A file that a process maps. Raises OSError: it cannot be had any more, or is no file that can be opened.

    Paths are the process's own choice, so each is tried and what it opens compared; map_files leads to what is mapped.
    """
    ways = (
        Target(mapped.path, mapped.dev, mapped.ino, True, mapped.path, root="/"),
        Target(mapped.path, mapped.dev, mapped.ino, False, f"/proc/{pid}/map_files/{mapped.place}", True),
        Target(mapped.path, mapped.dev, mapped.ino, False, mapped.path, root=f"/proc/{pid}/root"),
    )
    for target in ways[:-1]:
        with contextlib.suppress(OSError):
            os.close(target.open())
            return target
    os.close(ways[-1].open())
    return ways[-1]
