"""Remove a folder at a path where a socket, a file or a link is to be created.

This module runs in any thread of the agent, the gatekeeper and the commands.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from fgpu_ebpf.linux import procfs


def make_way(path: str) -> None:
    """Remove an empty folder at this path, or rename a folder with contents to `PATH.moved-TIME`.

    Raise OSError on failure.

    Do nothing if the path is not a folder. Docker creates a folder for the missing source of a bind mount, for example
    for a container that starts before the agent.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.rmdir(path)
    except OSError:
        os.rename(path, f"{path}.moved-{time.monotonic_ns()}")


def remove_moved(path: Path) -> None:
    """Remove the folders that make_way() has renamed at a path, except folders with a mount inside."""
    for folder in path.parent.glob(f"{path.name}.moved-*"):
        if not _has_mounts(folder):
            import shutil  # imported when needed: such folders are rare, and shutil imports libraries for compression

            shutil.rmtree(folder, ignore_errors=True)


def _has_mounts(folder: Path) -> bool:
    return any(Path(mount.path).is_relative_to(folder) for mount in procfs.mounts())
