"""Configuration files on disk: opened without being fooled, and who may have written them.

Owns: the rule that root alone may write what the agent obeys. Never: reads what is no regular file, or more than one
byte too many. On failure: FaultError with the mend; OSError for a file that is gone.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from fgpu_ebpf.yamlfile import MOST_BYTES, Fault, FaultError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells one content of a file from another, without reading it."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """The stamp of what `stat` found."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def load(path: str, name: str, root_only: bool, most_bytes: int = MOST_BYTES) -> tuple[bytes, Stamp]:
    """A file's content and stamp; faults call it `name`. Raises FaultError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a fifo must not hold us up
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise FaultError(Fault(name, 0, "", "is no regular file: remove it"))
        if root_only:
            _check_owner(name, os.readlink(f"/proc/self/fd/{fd}"), found, read_only(fd))
        with open(fd, "rb", closefd=False) as file:
            return file.read(most_bytes + 1), Stamp.of(found)
    finally:
        os.close(fd)


def way(path: str) -> tuple[tuple[int, int, int], ...]:
    """Inode, mode and owner of a folder and of all around it: what `check_folder` judges. OSError: it is gone."""
    real = os.path.realpath(path)
    stats = [os.stat(real[:end]) for end in (*(i for i, c in enumerate(real) if c == "/" and i), len(real))]
    return tuple((found.st_ino, found.st_mode, found.st_uid) for found in stats)


def check_folder(path: str, root_only: bool) -> None:
    """Raises FaultError where somebody else than root could put files into a folder. OSError: it is gone."""
    if root_only:
        _check_owner(path, os.path.realpath(path), os.stat(path), read_only(path))


def read_only(path: str | int) -> bool:
    """It lies on a mount that nobody here can write: a ConfigMap's folder has mode 0777."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _check_owner(name: str, real: str, found: os.stat_result, safe: bool) -> None:
    if safe:
        return
    if found.st_uid or found.st_mode & _OTHERS:
        text = f"may be written by others than root: chown root {real}; chmod go-w {real}"
        raise FaultError(Fault(name, 0, "", text))
    around = os.path.dirname(real)
    while True:  # whoever may write a folder around it may put another file in its place, unless it is sticky
        found = os.stat(around)
        if found.st_uid or (found.st_mode & _OTHERS and not found.st_mode & stat.S_ISVTX):
            text = f"lies in {around}, which others than root may write: chown root {around}; chmod go-w {around}"
            raise FaultError(Fault(name, 0, "", text))
        if around == "/":
            return
        around = os.path.dirname(around)
