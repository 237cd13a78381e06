"""Paths in a root that is somebody else's: what they lead to for who lives there, and never a file outside it.

Owns: openat2(2). Never: resolves such a path by itself, part by part or behind `/proc/PID/root/`, where a link that
begins with `/` leads to the host's own files. On failure: OSError.
"""

from __future__ import annotations

import ctypes
import os
import struct

_OPENAT2, _HOW = 437, struct.Struct("3Q")
NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, IN_ROOT = 0x01, 0x02, 0x04, 0x10
_LIBC = ctypes.CDLL(None, use_errno=True)


def find(root: int, path: str, resolve: int) -> int:
    """What a path leads to for who has that folder as its root, opened as a place alone (O_PATH). Raises OSError.

    `resolve`: what else must not be on the way.
    """
    how = _HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, resolve | IN_ROOT)
    place = int(_LIBC.syscall(_OPENAT2, root, os.fsencode(path), how, _HOW.size))
    if place < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return place


def find_mapped(root: str, path: str) -> int:
    """The same of a path that the kernel has told, which has no link in it: one that is there now was put there."""
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return find(folder, path, NO_SYMLINKS | NO_MAGICLINKS)
    finally:
        os.close(folder)
