"""statx(2) without a request to the file's file system, which may belong to another user and never respond."""

from __future__ import annotations

import ctypes
import stat

from fgpu_ebpf.linux.libc import LIBC, check

_AT_FDCWD, _DONT_SYNC, _TYPE = -100, 0x4000, 1
_BYTES, _MODE = 256, slice(28, 30)  # of struct statx


def is_character_device(path: str) -> bool:
    """Return whether a path, with links followed, refers to a character device. Raise OSError on failure."""
    found = ctypes.create_string_buffer(_BYTES)
    check("statx", LIBC.statx(_AT_FDCWD, path.encode(), _DONT_SYNC, _TYPE, found))
    return stat.S_ISCHR(int.from_bytes(found.raw[_MODE], "little"))
