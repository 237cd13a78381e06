"""openat2(2): open a path inside the root folder of another process, and never a file outside this folder.

This module runs in the agent's worker threads. Such a path must not be opened part by part or below `/proc/PID/root/`,
because the kernel would then resolve an absolute symbolic link in the path to a file of the host.
"""

from __future__ import annotations

import os
import struct

from fgpu_ebpf.linux.libc import LIBC, check

_OPENAT2, _HOW = 437, struct.Struct("3Q")
NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, IN_ROOT = 0x01, 0x02, 0x04, 0x10


def find(root: int, path: str, resolve: int) -> int:
    """Open a path with O_PATH, resolved as in a process with this root folder, and return the descriptor.

    Args:
        root: a descriptor of the root folder.
        path: the path inside the root folder.
        resolve: flags of openat2(2) in addition to IN_ROOT, for example NO_SYMLINKS.

    Raises:
        OSError: the path does not exist, or `resolve` forbids a part of the path.
    """
    how = _HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, resolve | IN_ROOT)
    return check("openat2", LIBC.syscall(_OPENAT2, root, os.fsencode(path), how, _HOW.size))


def find_mapped(root: str, path: str) -> int:
    """Open a path that the kernel has reported, and return the descriptor. Raise OSError on failure.

    Such a path contains no symbolic links, so the function refuses links that were created after the report.
    """
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return find(folder, path, NO_SYMLINKS | NO_MAGICLINKS)
    finally:
        os.close(folder)
