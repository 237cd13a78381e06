"""Check whether the processes that map a probed file have the file's breakpoints in their memory.

A probe is attached to an inode. Another inode can have the same (dev, ino) in /proc/PID/maps: after overlayfs has
copied a file up, new processes map the copy, which has no probe. A shared or a writable mapping has no breakpoints
either. Therefore a file counts as probed for a process only if the process's own memory holds the breakpoint.

of_process() and is_set() run in worker threads of the gatekeeper and the agent, because reading the memory of another
process can block on that process. The other functions also run in the agent's main thread. Mapped pages of foreign
files are read through /proc/self/mem and never accessed directly, because a file may have been truncated.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Mapping

from fgpu_ebpf.linux import mapped_files, procmaps
from fgpu_ebpf.linux.procmaps import File, Mapped

CODE = {"aarch64": bytes.fromhex("a00020d4")}.get(os.uname().machine, b"\xcc")
UNCHECKED = 1  # instead of an offset: the file has no probes, or an agent without such checks has probed it
CUDA_NAMES = (b"libcuda.so", b"libfgpu.so")
MOST_MAPPINGS = 64  # of files with names of libcuda or the shim, in one process
_REPLACED = (
    b"\x0f",
)  # the first byte of a multi-byte no-operation, which the kernel may replace by a call instead of a breakpoint


def choose(fd: int, offsets: Iterable[int]) -> int | None:
    """Return the first of `offsets` at which a breakpoint proves a probe, or None. Raise OSError on failure.

    A breakpoint proves nothing if the file itself contains the breakpoint, or if the kernel may use a call instead.
    """
    for offset in offsets:
        code = os.pread(fd, len(CODE), offset)
        if UNCHECKED < offset < 1 << 32 and code != CODE and not code.startswith(_REPLACED):
            return offset
    return None


def of_process(pid: int, check: Callable[[int, int], int | None]) -> Mapping[File, int]:
    """Return the libcuda and shim files that a process maps, with the offset at which a breakpoint was found, or 0.

    Args:
        pid: the process.
        check: returns the offset to check for a (dev, ino), or None if that file is not probed.

    Returns:
        (dev, ino) -> offset. If the mappings cannot be read, for example because there are too many mappings, the
        result is {(0, 0): 0}: a file that does not exist, without a breakpoint.
    """
    try:
        with procmaps.opened(pid) as maps, procmaps.opened(pid, "mem") as memory:
            found = list(procmaps.with_names(maps, CUDA_NAMES))
            if len(found) > MOST_MAPPINGS:
                return {(0, 0): 0}
            checks = {file: check(*file) for file in {(one.dev, one.ino) for one in found}}
            return {file: at if at and _in_all(memory, found, file, at) else 0 for file, at in checks.items()}
    except OSError:
        return {(0, 0): 0}


def is_set(pid: int, file: File, offset: int) -> bool | None:
    """Return whether a process has a file's breakpoint; None: the process does not map the file, or is unreadable."""
    try:
        with procmaps.opened(pid) as maps, procmaps.opened(pid, "mem") as memory:
            found = [one for one in procmaps.each(maps, procmaps.NEXT_EXECUTABLE) if (one.dev, one.ino) == file]
            return _in_all(memory, found, file, offset) if found else None
    except OSError:
        return None


def is_set_in_new_mappings(fd: int, offset: int) -> bool:
    """Return whether a new mapping of this open file has a breakpoint at the offset. Raise OSError on failure."""
    if os.pread(fd, len(CODE), offset) == CODE:  # a breakpoint in the file's own content proves nothing
        return False
    page = offset // mmap.PAGESIZE * mmap.PAGESIZE
    with mapped_files.a_page_of(fd, page) as at, procmaps.opened("self", "mem") as memory:
        return _has_breakpoint(memory, at + offset - page)


def _in_all(memory: int, found: Iterable[Mapped], file: File, offset: int) -> bool:
    """Return whether mappings of this file cover the offset, and all of these mappings hold the breakpoint."""
    if offset == UNCHECKED:
        return True
    places = [
        one.start + offset - one.offset
        for one in found
        if (one.dev, one.ino) == file and one.offset <= offset < one.offset + one.end - one.start
    ]
    return bool(places) and all(_has_breakpoint(memory, place) for place in places)


def _has_breakpoint(memory: int, place: int) -> bool:
    with contextlib.suppress(OSError, OverflowError):
        return os.pread(memory, len(CODE), place) == CODE
    return False
