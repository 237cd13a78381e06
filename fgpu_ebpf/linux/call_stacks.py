"""Threads that sleep inside a driver library, by the function that called the system call in which a thread waits.

A thread's stack pointer and its next instruction are in /proc/PID/task/TID/syscall while the thread sleeps. Above the
stack pointer lie the return addresses of all functions that have not returned. A word of the stack is taken for a
return address if the word points into executable memory and follows a call instruction.

A thread that a library of the driver has created has no frame of another library above the driver's frames. Such a
thread does not count, because such a thread always sleeps in the driver. A word may also be the rest of an earlier
call, in a frame that has not overwritten this word. Therefore a thread certainly is in the driver only if the innermost
frame outside libc is the driver's. Otherwise the thread *may* be in the driver.

Reading a process can block on the process. Errors are OSError: the process has ended, or must not be read.
"""

from __future__ import annotations

import bisect
import os
import platform
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from fgpu_ebpf.linux import procfs, procmaps

FIRST_BYTES, MOST_BYTES = 1 << 16, 1 << 18  # bytes of a stack that are read; the driver's frames lie in the first part
_LIBCUDA = b"libcuda.so"
_DRIVER = (_LIBCUDA, b"libnvidia-", b"libfgpu.so")  # the shim delays calls that the driver must not get
_LIBC = (b"libc.so", b"libc-", b"ld-", b"libpthread", b"[vdso]", b"[uprobes]", b"[vsyscall]")
_LONGEST_CALL = 7  # bytes of a call instruction of x86-64
_ANY_MAPPING = 0  # of procmaps.find()


class Where(IntEnum):
    """The possible places of a sleeping thread: IN_DRIVER means a call of the driver that another library has made."""

    ELSEWHERE = 0
    PERHAPS_IN_DRIVER = 1
    IN_DRIVER = 2


class Kind(IntEnum):
    """The kinds of modules that a search of the stack distinguishes."""

    OTHER = 0
    LIBC = 1
    DRIVER = 2


class Sleep(NamedTuple):
    """The place at which a thread sleeps. `call`: number and arguments of the system call, as text."""

    sp: int
    pc: int
    call: bytes


class Code(NamedTuple):
    """The executable mappings of a process, by ascending address. `has_libcuda`: a mapping has libcuda's name."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    kinds: tuple[Kind, ...]
    has_libcuda: bool

    def kind(self, address: int) -> Kind | None:
        """Return the kind of the module at an address; None: the address is in no executable mapping."""
        at = bisect.bisect_right(self.starts, address) - 1
        return self.kinds[at] if at >= 0 and address < self.ends[at] else None


def _kind_of(name: bytes) -> Kind:
    return Kind.DRIVER if name.startswith(_DRIVER) else Kind.LIBC if name.startswith(_LIBC) else Kind.OTHER


def code_of(pid: int) -> Code:
    """Return the executable mappings of a process. Raise OSError on failure."""
    with procmaps.opened(pid) as maps:
        found = [(m.start, m.end, m.path.rpartition(b"/")[2]) for m in procmaps.each(maps, procmaps.NEXT_CODE)]
    starts, ends, names = zip(*found, strict=True) if found else ((), (), ())
    return Code(starts, ends, tuple(map(_kind_of, names)), any(name.startswith(_LIBCUDA) for name in names))


def sleepers(pid: int) -> Iterator[tuple[int, Sleep]]:
    """Yield each sleeping thread of a process with the place at which the thread sleeps. Raise OSError on failure."""
    folder = f"/proc/{pid}/task"
    for name in os.listdir(folder):
        try:
            words = procfs.read(f"{folder}/{name}/syscall").split()
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
        if len(words) >= 3:  # otherwise the thread is running
            yield int(name), Sleep(int(words[-2], 16), int(words[-1], 16), b" ".join(words[:-2]))


class Stacks:
    """The memory of a process, from opening to close(). The constructor raises OSError on failure."""

    def __init__(self, pid: int) -> None:
        self._maps = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._maps)
            raise

    def close(self) -> None:
        """Close the process's files."""
        os.close(self._maps)
        os.close(self._memory)

    def where(self, sleep: Sleep, code: Code) -> Where:
        """Return where a thread sleeps. Raise OSError if the stack cannot be read."""
        kinds = self._frames(sleep, code)  # each search below continues where the previous search has stopped
        innermost = next((kind for kind in kinds if kind is not Kind.LIBC), None)
        if innermost is Kind.DRIVER:
            return Where.IN_DRIVER if Kind.OTHER in kinds else Where.ELSEWHERE
        is_called = any(kind is Kind.DRIVER for kind in kinds) and Kind.OTHER in kinds
        return Where.PERHAPS_IN_DRIVER if is_called else Where.ELSEWHERE

    def _frames(self, sleep: Sleep, code: Code) -> Iterator[Kind]:
        """Yield the kinds of the modules of all frames, innermost first."""
        here = code.kind(sleep.pc)
        if here is not None:
            yield here
        if not code.starts:
            return
        low, high = code.starts[0], code.ends[-1]
        end = min(procmaps.find(self._maps, sleep.sp, _ANY_MAPPING, named=False).end, sleep.sp + MOST_BYTES)
        is_driver = here is Kind.DRIVER
        for at, until in ((sleep.sp, min(end, sleep.sp + FIRST_BYTES)), (sleep.sp + FIRST_BYTES, end)):
            if at >= until or (at != sleep.sp and not is_driver):
                return
            raw = os.pread(self._memory, (until - at) // 8 * 8, at)
            for word in struct.unpack(f"{len(raw) // 8}Q", raw[: len(raw) // 8 * 8]):
                if low <= word < high and (kind := code.kind(word)) is not None and self._follows_call(word, code):
                    is_driver = is_driver or kind is Kind.DRIVER
                    yield kind

    def _follows_call(self, address: int, code: Code) -> bool:
        """Return whether the instruction before an address is, or may be, a call."""
        try:
            before = os.pread(self._memory, _LONGEST_CALL, address - _LONGEST_CALL)
        except OSError:  # the address begins a mapping, or the mapped file cannot be read
            return code.kind(address - 1) is not None
        return len(before) == _LONGEST_CALL and is_call(before)


def is_call(before: bytes) -> bool:
    """Return whether the last bytes before an address end in a call instruction of this machine."""
    if platform.machine() == "aarch64":
        word = int.from_bytes(before[-4:], "little")
        return word >> 26 == 0b100101 or word & 0xFFFFFC1F == 0xD63F0000  # bl, blr
    if before[-5] == 0xE8:  # call with a displacement
        return True
    return any(before[-n] == 0xFF and before[1 - n] >> 3 & 7 == 2 for n in range(2, _LONGEST_CALL + 1))
