"""Copies of other processes' descriptors, by pidfd_getfd(2). The caller needs the right to trace these processes."""

from __future__ import annotations

import os

from fgpu_ebpf.linux.libc import LIBC, check

_PIDFD_GETFD = 438  # identical on all architectures; Python's os module has no function for this system call


def copy_from(pidfd: int, descriptor: int) -> int:
    """Return a copy of a descriptor of a pidfd's process, which the caller closes. Raise OSError on failure."""
    return check("pidfd_getfd", LIBC.syscall(_PIDFD_GETFD, pidfd, descriptor, 0))


def copy_descriptor(pid: int, descriptor: int) -> int:
    """Return a copy of a process's descriptor, which the caller closes. Raise OSError on failure."""
    pidfd = os.pidfd_open(pid)
    try:
        return copy_from(pidfd, descriptor)
    finally:
        os.close(pidfd)
