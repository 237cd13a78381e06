"""Replacement of a file as a whole: a reader gets the whole old or the whole new text, even if the writer is killed.

This module runs in any thread of the agent, the gatekeeper and the commands. Each file has one writer at a time. After
an error the old file still exists, and the temporary file is removed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fgpu_ebpf.linux.clear_path import make_way


def write(path: Path, text: str, mode: int = 0o644, durable: bool = False) -> None:
    """Write a text to a temporary file in the same folder, and rename this file to the path.

    Args:
        path: the file to replace. A folder at this path is removed or renamed first.
        text: the new content. Text that was read with errors="surrogateescape" is written unchanged.
        mode: the permissions of the file, independent of the umask.
        durable: after a loss of power, the file has the whole old or new text. Files in /run do not need this.

    Raises:
        OSError: nothing was replaced, or the file was replaced and sync_folder() failed.
    """
    temporary = temporary_of(path)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            os.fchmod(fd, mode)
            file.write(text)
            if durable:
                file.flush()
                os.fsync(fd)
        _replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def temporary_of(path: str | os.PathLike[str]) -> str:
    """Return the temporary file of write(). A writer that was killed leaves this file behind."""
    folder, name = os.path.split(path)  # a Path would intern the name for ever
    return os.path.join(folder, f".{name}.new")


def sync_folder(folder: Path) -> None:
    """Write the names of a folder to the disk, so that a rename is kept after a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _replace(temporary: str, path: Path) -> None:
    try:
        os.replace(temporary, path)
    except IsADirectoryError:  # engines create a folder for the missing source of a file's bind mount
        make_way(str(path))
        os.replace(temporary, path)
