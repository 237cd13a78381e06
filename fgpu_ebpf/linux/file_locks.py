"""Files of the run folder that one process at a time locks (flock).

This module runs in the main threads of the agent, the gatekeeper and the commands. A process that may read a file can
lock the file. Therefore only root may read these files; otherwise any local user could prevent the start of the agent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from fgpu_ebpf.linux.clear_path import make_way

AGENT, GATEKEEPER = "agent.lock", "gatekeeper.lock"
NEXT = "gatekeeper.next"  # held by a gatekeeper that waits for GATEKEEPER
MODE = 0o600
LOOKS, LOOK_SECONDS = 10, 0.01


class FileLock:
    """A file that is locked from take() until release() or the end of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def take(self) -> bool:
        """Create the folder and the file, lock the file and write this process's pid to the file.

        Return False if another process holds the lock. Raise OSError on failure.
        """
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = self._open()
        os.fchmod(fd, MODE)  # earlier versions created a file that every user could read
        if not _locked_at_last(fd):
            os.close(fd)
            return False
        self._file = fd
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return True

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self.path, flags, MODE)
        except IsADirectoryError:
            make_way(str(self.path))
            return os.open(self.path, flags, MODE)

    def is_held(self) -> bool:
        """Return whether the path still refers to the file that take() has locked. Raise OSError on failure."""
        try:
            there = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(there, os.fstat(self._file))

    def release(self) -> None:
        """Release the lock, and keep the file. Do nothing if the lock is not held."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def is_locked(path: str | Path) -> bool:
    """Return whether a process holds the file's lock; False if the file does not exist. Raise OSError on failure."""
    # Frequent callers pass a string: a Path interns its parts, and the table of interned strings grows by a megabyte.
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, IsADirectoryError):
        return False
    except BlockingIOError:
        return True
    return False


def holder(path: Path) -> int | None:
    """Return the pid that the last holder wrote, which is valid in the holder's pid namespace, or None."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii"))
    return None


def _locked_at_last(fd: int) -> bool:
    """Try to lock for LOOKS * LOOK_SECONDS, because is_locked() in another process holds the lock for a moment."""
    for _ in range(LOOKS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOOK_SECONDS)
        else:
            return True
    return False
