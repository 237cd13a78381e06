"""Words that two processes share, and the kernel's help in waiting for them: futexes.

Owns: the list of words that one thread sleeps on. Never: believes a word; whoever is woken looks for himself. On
failure: OSError where the kernel lacks a call (futex_waitv: Linux 5.16).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Sequence

MOST_WORDS = 126  # of the 128 that futex_waitv takes
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 202)
_FUTEX_WAITV, _FUTEX_WAKE, _SIZE_U32, _PRIVATE, _MONOTONIC = 449, 1, 2, 128, 1
_EXPECTED = (errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR)
_EVERYBODY = 2**31 - 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
Word = ctypes.c_uint32
_Form = ctypes.c_uint64 * (3 * (1 + MOST_WORDS))  # value, address, flags


def wake(address: int) -> None:
    """Everybody who sleeps on the word there, in whatever process."""
    _libc.syscall(_FUTEX, ctypes.c_void_p(address), _FUTEX_WAKE, _EVERYBODY, None, None, 0)


def fence() -> None:
    """What was stored before is seen by others before we load what follows: a call into the kernel and back."""
    _libc.getppid()


class Bells:
    """Words that one thread sleeps on until one of them has another value than was last heard, or is nudged."""

    def __init__(self) -> None:
        self._nudge = Word(0)
        self._time = (ctypes.c_int64 * 2)()
        self.watch(())

    def watch(self, addresses: Sequence[int]) -> None:
        """These words from now on, at most MOST_WORDS; what was heard of each is to be told anew."""
        every = (ctypes.addressof(self._nudge), *addresses[:MOST_WORDS])
        self._count = len(every)
        self._form = _Form()
        for place, address in enumerate(every):
            self._form[3 * place + 1], self._form[3 * place + 2] = address, _SIZE_U32
        self._form[0] = self._nudge.value

    def heard(self, place: int, value: int) -> None:
        """So much was heard of the word that was given in this place."""
        self._form[3 * place + 3] = value

    def mute(self, place: int, is_mute: bool) -> None:
        """Whoever wakes those at the word in this place does not mean us: a private futex has no other processes."""
        self._form[3 * place + 5] = _SIZE_U32 | _PRIVATE if is_mute else _SIZE_U32

    def nudge(self) -> None:
        """Whoever sleeps, or is about to, wakes up: from any thread."""
        self._nudge.value = (self._nudge.value + 1) & 0xFFFFFFFF
        wake(ctypes.addressof(self._nudge))

    def collect(self) -> None:
        """All nudges so far have been heard."""
        self._form[0] = self._nudge.value

    def wait(self, until_ns: int | None) -> None:
        """Until then, or until something has changed; None: without an end. Raises OSError."""
        self._time[0], self._time[1] = divmod(until_ns or 0, 1_000_000_000)
        time = None if until_ns is None else self._time
        if _libc.syscall(_FUTEX_WAITV, self._form, self._count, 0, time, _MONOTONIC) < 0:
            code = ctypes.get_errno()
            if code not in _EXPECTED:
                raise OSError(code, f"futex_waitv: {os.strerror(code)}")
