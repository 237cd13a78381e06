"""The C library of this process, for functions that Python's os module lacks.

fgpu calls the library's functions for capabilities, mounts, namespaces, mmap, inotify and malloc, and syscall() for
bpf, perf_event_open, futex, openat2 and pidfd_getfd. The functions are safe in any thread, because each thread has its
own errno.
"""

from __future__ import annotations

import ctypes
import os

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long


def check(name: str, result: int) -> int:
    """Return the result of a C function. Raise OSError (errno, name of the function) if the result is negative."""
    if result < 0:
        raise failure(name, ctypes.get_errno())
    return result


def failure(name: str, code: int) -> OSError:
    """Return the OSError for a C function that has set errno to `code`."""
    return OSError(code, f"{name}: {os.strerror(code)}")
