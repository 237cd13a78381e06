"""What libcuda a program would find in its own root, before it maps one.

Owns: which roots have been looked into, and what was found there. Never: leaves a root by a link, or opens what is
mounted into it: that may be a file system that never answers, and what a container is given is the host's own. Where it
fails, nothing is found; a process that maps a libcuda is known by its hello, or by NVML.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator, Set

from fgpu_ebpf import innerpath, procfs
from fgpu_ebpf.library_files import LIBRARY_FOLDERS, Target
from fgpu_ebpf.mappings import File

# Mount namespace, by its number, which is never given again, or by its inode, which may be (Linux before 6.11: a root
# with that inode and the same / is not looked into, and its processes are known by their hello); dev and ino of /.
Root = tuple[int, int, int]
NAMES = ("libcuda.so.1", "libcuda.so")
FOLDERS = (*LIBRARY_FOLDERS, "usr/local/cuda/compat/lib")
MOST_ROOTS = 256  # the one that no program has begun in for longest is forgotten, and looked into when one does
_NS_GET_ID, _ID = 0x8008B705, struct.Struct("Q")  # Linux 6.11


class Roots:
    """Each is looked into once, as long as what was found there is probed."""

    def __init__(self, own: str = "/") -> None:
        """`own`: the host's root. Its files are found otherwise."""
        self._own = _place(own)
        self._seen: dict[Root, None] = {}  # the last to be entered comes last
        self._found: dict[File, set[Root]] = {}

    def __contains__(self, root: Root) -> bool:
        """Whether it has been looked into, or is the host's. In any thread."""
        return root in self._seen or root[1:] == self._own

    def enter(self, root: Root) -> None:
        """A program has begun there, and it has been looked into."""
        if root[1:] == self._own:
            return
        self._seen.pop(root, None)
        self._seen[root] = None
        if len(self._seen) > MOST_ROOTS:
            self._forget_root(next(iter(self._seen)))

    def found(self, file: File, root: Root) -> None:
        """Processes that live in this root may map the file yet."""
        self._found.setdefault(file, set()).add(root)

    def forget(self, file: File) -> None:
        """The file is probed no more: a root that has it is looked into when the next program begins there."""
        for root in self._found.pop(file, set()):
            self._seen.pop(root, None)

    def _forget_root(self, root: Root) -> None:
        del self._seen[root]
        self._found = {file: left for file, roots in self._found.items() if (left := roots - {root})}

    def dwellers(self, files: Set[File], pids: Iterable[int]) -> dict[File, int]:
        """Map each of these files that is in the root of one of these processes to one such process."""
        awaited = files & self._found.keys()
        living = {root_of(pid): pid for pid in pids} if awaited else {}
        return {file: living[root] for file in awaited for root in self._found[file] if root in living}


def root_of(pid: int) -> Root | None:
    """The root of a process. None: it is gone."""
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
    """The libcuda files where a loader looks for them in a process's root, open until all are done."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, root)
        for path in (f"{folder}/{name}" for folder in FOLDERS for name in NAMES):
            with contextlib.suppress(OSError):
                fd = innerpath.find(root, path, innerpath.NO_XDEV)
                stack.callback(os.close, fd)
                way = f"/proc/self/fd/{fd}"
                yield Target(os.path.normpath(f"/{path}"), *procfs.as_mapped(way), False, way, True)
