"""The reading of configuration files, and the check that only root can have written a file.

The functions run in the thread of the agent or command that reads the file. Only regular files up to a maximum size are
read. The message of InvalidFileError contains the commands that correct the permissions.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from fgpu_ebpf.policy.yaml_document import MOST_BYTES, ConfigError, InvalidFileError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Stamp(NamedTuple):
    """The identity of a file's content, from the stat result. The content has changed only if the stamp has changed."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """Return the stamp of a file from its stat result."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def load(path: str, name: str, root_only: bool, most_bytes: int = MOST_BYTES) -> tuple[bytes, Stamp]:
    """Return a file's content and stamp.

    Args:
        path: the path of the file.
        name: the name of the file in errors.
        root_only: refuse a file that users other than root can write.
        most_bytes: the maximum size. A larger file is truncated after one additional byte, so that the caller can
            detect the size.

    Raises:
        InvalidFileError: the file is not a regular file, or users other than root can write the file.
        OSError: the file cannot be opened or read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # without O_NONBLOCK, open() of a FIFO blocks
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidFileError(ConfigError(name, 0, "", "is not a regular file: remove it"))
        if root_only:
            _check_owner(name, os.readlink(f"/proc/self/fd/{fd}"), found, read_only(fd))
        with open(fd, "rb", closefd=False) as file:
            return file.read(most_bytes + 1), Stamp.of(found)
    finally:
        os.close(fd)


def path_stats(path: str) -> tuple[tuple[int, int, int], ...]:
    """Return (inode, mode, owner) of a folder and of each enclosing folder. Raise OSError if a folder does not exist.

    The result of check_folder() depends only on these values, and on whether the folder's mount is read-only.
    """
    real = os.path.realpath(path)
    stats = [os.stat(real[:end]) for end in (*(i for i, c in enumerate(real) if c == "/" and i), len(real))]
    return tuple((found.st_ino, found.st_mode, found.st_uid) for found in stats)


def check_folder(path: str, root_only: bool) -> None:
    """Check that only root can create files in the folder.

    Raises:
        InvalidFileError: a user other than root can write the folder or an enclosing folder.
        OSError: the folder does not exist.
    """
    if root_only:
        _check_owner(path, os.path.realpath(path), os.stat(path), read_only(path))


def read_only(path: str | int) -> bool:
    """Return whether the path is on a read-only mount, which no process can write whatever the mode.

    For example, the folder of a Kubernetes ConfigMap has mode 0777 and is mounted read-only.
    """
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _check_owner(name: str, real: str, found: os.stat_result, safe: bool) -> None:
    if safe:
        return
    if found.st_uid or found.st_mode & _OTHERS:
        text = f"may be written by users other than root: chown root {real}; chmod go-w {real}"
        raise InvalidFileError(ConfigError(name, 0, "", text))
    around = os.path.dirname(real)
    while True:  # a user that can write a folder around the file could replace the file, unless the folder is sticky
        found = os.stat(around)
        if found.st_uid or (found.st_mode & _OTHERS and not found.st_mode & stat.S_ISVTX):
            text = f"is in {around}, which users other than root may write: chown root {around}; chmod go-w {around}"
            raise InvalidFileError(ConfigError(name, 0, "", text))
        if around == "/":
            return
        around = os.path.dirname(around)
