"""Search for the libcuda that a program would find in its own root, before the program maps the file.

This module runs in the agent: libraries() in worker threads, root_of() in worker threads and the main thread, and Roots
in the main thread. No link is followed out of a root. File systems that are mounted into a root are not opened, because
these file systems may never respond, and because drivers that an engine mounts into a container are the host's own
files. After a failed search, a process that maps a libcuda is found by its hello or by NVML.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator, Set

from fgpu_ebpf.driver.library_files import LIBRARY_FOLDERS, Target
from fgpu_ebpf.linux import mapped_files, openat2
from fgpu_ebpf.linux.procmaps import File

# The mount namespace, and dev and ino of /. The namespace is identified by its id, which is never reused. Before Linux
# 6.11, the namespace is identified by its inode. If the inode is reused with the same /, the new root is not searched,
# and its processes are found by their hello.
Root = tuple[int, int, int]
NAMES = ("libcuda.so.1", "libcuda.so")
FOLDERS = (*LIBRARY_FOLDERS, "usr/local/cuda/compat/lib")
MOST_ROOTS = 256  # if there are more, the root in which no program has started for the longest time is removed
_NS_GET_ID, _ID = 0x8008B705, struct.Struct("Q")  # since Linux 6.11


class Roots:
    """The roots that were searched. A root is searched once, as long as the files found in this root are probed."""

    def __init__(self, own: str = "/") -> None:
        """Create an empty set. `own`: the host's root, which is never searched."""
        self._own = _place(own)
        self._seen: dict[Root, None] = {}  # in the order of the last start
        self._found: dict[File, set[Root]] = {}

    def __contains__(self, root: Root) -> bool:
        """Return whether a root has been searched, or is the host's root. Any thread may call this method."""
        return root in self._seen or root[1:] == self._own

    def enter(self, root: Root) -> None:
        """Record that a program has started in a root, and that this root was searched."""
        if root[1:] == self._own:
            return
        self._seen.pop(root, None)
        self._seen[root] = None
        if len(self._seen) > MOST_ROOTS:
            self._forget_root(next(iter(self._seen)))

    def found(self, file: File, root: Root) -> None:
        """Record that processes in this root may map the file later."""
        self._found.setdefault(file, set()).add(root)

    def forget(self, file: File) -> None:
        """Remove a file whose probes were removed. Roots with this file are searched again when a program starts."""
        for root in self._found.pop(file, set()):
            self._seen.pop(root, None)

    def _forget_root(self, root: Root) -> None:
        del self._seen[root]
        self._found = {file: left for file, roots in self._found.items() if (left := roots - {root})}

    def processes_inside(self, files: Set[File], pids: Iterable[int]) -> dict[File, int]:
        """Return, by file, the pid of a process in the root of which the file was found.

        `pids`: the processes to consider. Files that are in no root of these processes are left out.
        """
        awaited = files & self._found.keys()
        living = {root_of(pid): pid for pid in pids} if awaited else {}
        return {file: living[root] for file in awaited for root in self._found[file] if root in living}


def root_of(pid: int) -> Root | None:
    """Return the root of a process; None: the process has exited."""
    try:
        space = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            number = _number(space)
        finally:
            os.close(space)
        return number, *_place(f"/proc/{pid}/root")
    except OSError:
        return None


def _number(space: int) -> int:
    try:
        return int(_ID.unpack(fcntl.ioctl(space, _NS_GET_ID, bytes(8)))[0])
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
    return os.fstat(space).st_ino


def _place(path: str) -> tuple[int, int]:
    at = os.stat(path)
    return at.st_dev, at.st_ino


def libraries(pid: int) -> Iterator[Target]:
    """Yield the libcuda files in a process's root, at the paths that a loader searches.

    The descriptors behind the targets stay open until the iterator ends.
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, root)
        for path in (f"{folder}/{name}" for folder in FOLDERS for name in NAMES):
            with contextlib.suppress(OSError):
                fd = openat2.find(root, path, openat2.NO_XDEV)
                stack.callback(os.close, fd)
                way = f"/proc/self/fd/{fd}"
                yield Target(os.path.normpath(f"/{path}"), *mapped_files.as_mapped(way), False, way, True)
