"""Futexes: waiting for changes of 32-bit words that two processes share.

The gatekeeper's time slicer thread waits for many words at once, and any thread may wake this thread. A woken thread
must read the words again, because a wake-up does not prove a change. futex_waitv needs Linux 5.16.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

from fgpu_ebpf.linux.libc import LIBC, failure

MOST_WORDS = 126  # futex_waitv accepts 128 words
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(os.uname().machine, 202)
_FUTEX_WAITV, _FUTEX_WAKE, _SIZE_U32, _PRIVATE, _MONOTONIC = 449, 1, 2, 128, 1
_EXPECTED = (errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR)
_ALL_WAITERS = 2**31 - 1
Word = ctypes.c_uint32
_Waiters = ctypes.c_uint64 * (3 * (1 + MOST_WORDS))  # struct futex_waitv: value, address, flags


def wake(address: int) -> None:
    """Wake all threads that wait for the word at this address, in all processes."""
    LIBC.syscall(_FUTEX, ctypes.c_void_p(address), _FUTEX_WAKE, _ALL_WAITERS, None, None, 0)


def fence() -> None:
    """Order all earlier stores before all later loads, by entering and leaving the kernel."""
    LIBC.getppid()


class FutexWords:
    """Words for which one thread waits, until a word differs from its expected value or wake() is called."""

    def __init__(self) -> None:
        self._own = Word(0)
        self._time = (ctypes.c_int64 * 2)()
        self.watch(())

    def watch(self, addresses: Sequence[int]) -> None:
        """Watch only the words at `addresses`, at most MOST_WORDS. Afterwards, call expect() for each word."""
        every = (ctypes.addressof(self._own), *addresses[:MOST_WORDS])
        self._count = len(every)
        self._waiters = _Waiters()
        for place, address in enumerate(every):
            self._waiters[3 * place + 1], self._waiters[3 * place + 2] = address, _SIZE_U32
        self._waiters[0] = self._own.value

    def expect(self, place: int, value: int) -> None:
        """Set the expected value of the word in slot `place`. wait() returns when the word differs."""
        self._waiters[3 * place + 3] = value

    def ignore(self, place: int, is_ignored: bool) -> None:
        """Set whether wake-ups of slot `place` are ignored.

        An ignored slot waits with FUTEX_PRIVATE_FLAG, which never matches a wake-up of another process.
        """
        self._waiters[3 * place + 5] = _SIZE_U32 | _PRIVATE if is_ignored else _SIZE_U32

    def wake(self) -> None:
        """Make the current or the next wait() return. Any thread may call this method."""
        self._own.value = (self._own.value + 1) & 0xFFFFFFFF
        wake(ctypes.addressof(self._own))

    def clear(self) -> None:
        """Discard the calls of wake() so far. The next wait() returns only for later calls."""
        self._waiters[0] = self._own.value

    def wait(self, until_ns: int | None) -> None:
        """Wait until a word changes, or until `until_ns` (CLOCK_MONOTONIC); None: wait without a timeout.

        Raise OSError on failure.
        """
        self._time[0], self._time[1] = divmod(until_ns or 0, 1_000_000_000)
        time = None if until_ns is None else self._time
        if LIBC.syscall(_FUTEX_WAITV, self._waiters, self._count, 0, time, _MONOTONIC) < 0:
            code = ctypes.get_errno()
            if code not in _EXPECTED:
                raise failure("futex_waitv", code)
