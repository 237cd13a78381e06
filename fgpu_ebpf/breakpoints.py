"""Whether the processes that map a probed file have its breakpoints in their memory.

A probe is attached to an inode. Another inode can stand behind the same (dev, ino) of /proc/PID/maps: once overlayfs
has copied a file up, processes that start map the copy, where no probe is. A shared or a writable mapping has no
breakpoints either. So a file counts as probed for a process only where the process's own memory holds the breakpoint.

Used by: the gatekeeper's mapping readers and the agent's library workers, in threads of their own, since reading the
memory of a process can wait for that process. Never: touches a mapped page of another party's file, which could have
been cut shorter. Raises OSError where it says so.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping

from fgpu_ebpf import mappings, procfs
from fgpu_ebpf.mappings import File, Mapped

CODE = {"aarch64": bytes.fromhex("a00020d4")}.get(platform.machine(), b"\xcc")
UNCHECKED = 1  # in place of an offset: of a file that an agent before these checks has probed, or that has no probes
MOST_MAPPINGS = 64  # of one process, with names of libcuda or the shim
_REPLACED = (
    b"\x0f",
)  # where a no-operation of several bytes begins, the kernel may put a call in place of a breakpoint


def choose(fd: int, offsets: Iterable[int]) -> int | None:
    """The first of these probed offsets at which a breakpoint proves a probe; None: there is none. Raises OSError."""
    for offset in offsets:
        code = os.pread(fd, len(CODE), offset)
        if UNCHECKED < offset < 1 << 32 and code != CODE and not code.startswith(_REPLACED):
            return offset
    return None


def of_process(pid: int, check: Callable[[int, int], int | None]) -> Mapping[File, int]:
    """The libcuda and shim files that a process maps, each with the offset at which its breakpoint was seen, else 0.

    `check` returns the offset to look at; None: the file is not probed. Where the mappings cannot be read, as of a
    process that maps absurdly much, a file that no process has is returned.
    """
    try:
        with _opened(f"/proc/{pid}/maps") as maps, _opened(f"/proc/{pid}/mem") as memory:
            found = list(procfs.with_cuda_names(maps))
            if len(found) > MOST_MAPPINGS:
                return {(0, 0): 0}
            checks = {file: check(*file) for file in {(one.dev, one.ino) for one in found}}
            return {file: at if at and _in_all(memory, found, file, at) else 0 for file, at in checks.items()}
    except OSError:
        return {(0, 0): 0}


def is_set(pid: int, file: File, offset: int) -> bool | None:
    """Whether a process that maps this file has its breakpoint there. None: it does not map it, or cannot be read."""
    try:
        with _opened(f"/proc/{pid}/maps") as maps, _opened(f"/proc/{pid}/mem") as memory:
            found = [one for one in mappings.each(maps, mappings.NEXT_EXECUTABLE) if (one.dev, one.ino) == file]
            return _in_all(memory, found, file, offset) if found else None
    except OSError:
        return None


def is_set_in_new_mappings(fd: int, offset: int) -> bool:
    """Whether a process that maps this open file from now on gets a breakpoint there. Raises OSError."""
    if os.pread(fd, len(CODE), offset) == CODE:  # a file that says so itself proves nothing
        return False
    page = offset // mmap.PAGESIZE * mmap.PAGESIZE
    with procfs.a_page_of(fd, page) as at, _opened("/proc/self/mem") as memory:
        return _there(memory, at + offset - page)


def _in_all(memory: int, found: Iterable[Mapped], file: File, offset: int) -> bool:
    """All executable mappings of this file that cover the offset have the breakpoint, and one covers it."""
    if offset == UNCHECKED:
        return True
    places = [
        one.start + offset - one.offset
        for one in found
        if (one.dev, one.ino) == file and one.offset <= offset < one.offset + one.end - one.start
    ]
    return bool(places) and all(_there(memory, place) for place in places)


def _there(memory: int, place: int) -> bool:
    with contextlib.suppress(OSError, OverflowError):
        return os.pread(memory, len(CODE), place) == CODE
    return False


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
