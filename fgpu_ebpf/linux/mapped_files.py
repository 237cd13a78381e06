"""Files that processes map: their names in /proc/PID/maps, and functions that open such a file safely.

This module runs in the agent's main thread and worker threads, and in the commands.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from fgpu_ebpf.linux import procmaps
from fgpu_ebpf.linux.libc import LIBC

LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_MAP_FAILED = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A mapped file as in /proc/PID/maps. `place`: the name of a mapping in /proc/PID/map_files."""

    path: str
    dev: int
    ino: int
    place: str = field(default="", compare=False)

    @classmethod
    def of(cls, found: procmaps.Mapped) -> MappedFile:
        """Return the file of a mapping."""
        path = os.fsdecode(found.path.removesuffix(b" (deleted)"))
        return cls(path, found.dev, found.ino, f"{found.start:x}-{found.end:x}")


def open_regular(path: str, follow: bool = False) -> int:
    """Open for reading a file that a tenant may have created. Raise OSError if the file is not a regular file.

    The type is checked before the file is opened for reading, because open() of a fifo would block, and open() of a
    device can have side effects. With O_NONBLOCK, a lease on the file does not block either.

    Args:
        path: the file.
        follow: the last part of the path may be a symbolic link.
    """
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(handle)


def as_mapped(path: str) -> tuple[int, int]:
    """Return (dev, ino) of a file as in /proc/PID/maps. Raise OSError on failure.

    On some overlays, stat() returns other numbers.
    """
    fd = open_regular(path, follow=True)
    try:
        return mapped_as(fd)
    finally:
        os.close(fd)


def mapped_as(fd: int) -> tuple[int, int]:
    """Return (dev, ino) of an open file as in /proc/PID/maps. Raise OSError on failure."""
    with a_page_of(fd, 0) as at:
        with procmaps.opened("self") as maps:
            found = procmaps.find(maps, at, named=False)
        return found.dev, found.ino


@contextlib.contextmanager
def a_page_of(fd: int, offset: int) -> Iterator[int]:
    """Map one page of an open file as private, and yield its address. Raise OSError on failure.

    The caller has to read the page through /proc/self/mem. An access to the address would kill this process (SIGBUS) if
    the file has been truncated.
    """
    at = LIBC.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, offset)
    if at == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"the file cannot be mapped: {os.strerror(number)}")
    try:
        yield at
    finally:
        LIBC.munmap(ctypes.c_void_p(at), ctypes.c_size_t(mmap.PAGESIZE))
