"""Places where sockets, files and links of ours are to be.

Owns: nothing. Used by agent and gatekeeper when they make one. On failure: OSError.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path


def make_way(path: str) -> None:
    """Take a folder away from where a socket, file or link is to be; move it aside if something is in it.

    Docker makes one for a bind mount with a source that is not there yet: of a container that starts before the agent.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.rmdir(path)
    except OSError:
        os.rename(path, f"{path}.moved-{time.monotonic_ns()}")


def remove_moved(path: Path) -> None:
    """Remove what make_way() has moved aside from a path, unless something is mounted in it."""
    for folder in path.parent.glob(f"{path.name}.moved-*"):
        if not _has_mounts(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _has_mounts(folder: Path) -> bool:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return any(Path(line.split()[4]).is_relative_to(folder) for line in file)
