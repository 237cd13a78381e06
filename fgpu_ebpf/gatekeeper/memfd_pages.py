"""The two pages that the gatekeeper makes for a process, each a sealed memfd: the control page and the status page.

This module runs in the gatekeeper's main thread and in its time slicer thread. The content of a status page is not
trusted. If the kernel refuses a memfd or a seal, the constructor raises OSError and leaves no descriptor open. Access
to a page never causes SIGBUS, because the page is sealed against resizing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from itertools import islice

from fgpu_ebpf.abi import LAYOUT, PAGE_BYTES, ROWS, ControlPage, Row, StatusPage
from fgpu_ebpf.linux.libc import LIBC

_SEAL, _SHRINK, _GROW, _FUTURE_WRITE = fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, 0x10
_NOEXEC_SEAL = 0x8  # Linux 6.3; sysctl vm.memfd_noexec=2 refuses a memfd without this seal
_STATUS_HEAD = bytes(StatusPage(version=LAYOUT))[:8]


def _fence() -> None:
    """Order all earlier stores before all later stores: a ctypes call releases and takes the interpreter's lock."""
    LIBC.getppid()


def _sealable(name: str) -> int:
    flags = os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC
    try:
        fd = os.memfd_create(name, flags | _NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)
    os.ftruncate(fd, PAGE_BYTES)
    return fd


class ControlMemory:
    """A control page that only this process can write. Other processes get `descriptor`, which is read-only.

    `page` is a view of the mapping and does not exist after close(). Descriptors that were sent stay readable. The
    constructor raises OSError on failure.
    """

    __slots__ = ("_map", "descriptor", "page")

    def __init__(self) -> None:
        fd = _sealable("fgpu-control")
        try:
            self._map = mmap.mmap(fd, PAGE_BYTES)  # mapped before the seal, which forbids later writable mappings
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SHRINK | _GROW | _FUTURE_WRITE | _SEAL)
            os.fchmod(fd, 0o444)
            self.descriptor = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(fd)
        self.page = ControlPage.from_buffer(self._map)

    def show(self, rows: bytes) -> None:
        """Replace the table of processes by `rows` from row_bytes().

        The sequence word is odd during the change. A reader that finds an odd or changed sequence word reads the table
        again.
        """
        page = self.page
        page.sequence += 1
        _fence()
        ctypes.memmove(ctypes.addressof(page) + ControlPage.rows.offset, rows, len(rows))
        page.row_count = len(rows) // ctypes.sizeof(Row)
        _fence()
        page.sequence += 1

    def leave(self) -> None:
        """Close the descriptor. The page is unmapped with its last reference: another thread may still use the page."""
        os.close(self.descriptor)

    def close(self) -> None:
        """Close the descriptor and unmap the page. A view that still exists keeps the mapping until it is deleted."""
        self.leave()
        memory = self._map
        del self.page, self._map
        _unmap(memory)


class StatusMemory:
    """A status page: the tenant writes through `descriptor`, this process reads `page`.

    The constructor raises OSError on failure.
    """

    __slots__ = ("_map", "_page", "descriptor")

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self.descriptor = _sealable("fgpu-status")
        try:
            os.pwrite(self.descriptor, _STATUS_HEAD, 0)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SHRINK | _GROW | _SEAL)
        except OSError:
            os.close(self.descriptor)
            raise

    @property
    def page(self) -> StatusPage:
        """The page, mapped at the first access. The page does not exist after close()."""
        if self.descriptor < 0:
            raise AttributeError("page")
        if self._map is None:
            self._map = mmap.mmap(self.descriptor, PAGE_BYTES)
            self._page = StatusPage.from_buffer(self._map)
        return self._page

    def close(self) -> None:
        """Close the descriptor and unmap the page. A view that still exists keeps the mapping until it is deleted."""
        os.close(self.descriptor)
        self.descriptor = -1
        memory, self._map = self._map, None
        if memory:
            del self._page
            _unmap(memory)


def _unmap(memory: mmap.mmap) -> None:
    with contextlib.suppress(BufferError):  # another view still exists; the deletion of the last view unmaps the page
        memory.close()


def row_bytes(rows: Iterable[tuple[int, int, int]]) -> bytes:
    """Return the first ROWS rows `(pid, device, bytes)` in the form that ControlMemory.show() takes."""
    return b"".join(bytes(Row(*row)) for row in islice(rows, ROWS))
