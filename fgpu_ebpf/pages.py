"""The pages, messages and map values that cross a process boundary, and the memfds that carry two of the pages.

Owns the ctypes form of everything in bpf/fgpu.h (`tests/unit/test_layout.py` compares them offset by offset), and the
life of control and status pages: made, mapped, sealed, closed. Never decides what a page says, and never trusts what
a tenant writes into one. When the kernel refuses a memfd or a seal the constructor raises OSError and leaves nothing
behind; a page once made cannot fail: sealed against resizing, it never raises SIGBUS.

Values are stored as aligned words, by ctypes: a reader in another process sees the old or the new one, nothing between
(`struct.pack_into` shows it zeros). Sizes are bytes, times CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from ctypes import Structure
from ctypes import c_int64 as s64
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from enum import IntEnum, IntFlag

LAYOUT = 1
PAGE_BYTES = 4096
DEVICES = 16
LEVELS = 4
VERDICTS = 128
ROWS = 128
NO_LIMIT = 2**64 - 1
MOST_BYTES = 1 << 48
LEASE_NS = 2_000_000_000
MAGIC = 0x75706766
SOCKET_DIR = "/run/fgpu/shim"
SOCKET = SOCKET_DIR + "/shim.sock"

# Numbered as in the header, from 0.
Verdict = IntEnum("Verdict", "REFUSED ADMITTED AGAIN UNLIMITED", start=0)
Kind = IntEnum("Kind", "MEMORY POOL CONTEXT HELLO VMM KINDS", start=0)
Reason = IntEnum("Reason", "LIMIT DEVICE_FULL OBSERVED", start=0)
Anomaly = IntEnum("Anomaly", "RELEASE FULL DEVICE LOST BYPASS STALE", start=0)
Code = IntEnum("Code", "REFUSED MANAGED UNMANAGED", start=0)
Space = IntEnum("Space", "POINTER HANDLE MAPPING CONTEXT ARRAY", start=0)
Function = IntEnum(
    "Function",
    "NONE ALLOC ALLOC_MANAGED ALLOC_PITCH ARRAY ARRAY_3D ARRAY_MIPMAPPED CREATE MAP UNMAP RETAIN_HANDLE RETAIN "
    "PRIMARY_RELEASE PRIMARY_RESET CONTEXT_V2 CONTEXT_V3 CONTEXT_V4 FREE RELEASE ARRAY_DESTROY DESTROY",
    start=0,
)
Adjust = IntEnum("Adjust", "PUBLISH OVERHEAD MOVE REAP", start=0)

# Bits, from 1: of a limit and a usage page; of a control page and an answer; of a process.
LimitFlag = IntFlag("LimitFlag", "OBSERVE KILL")
ControlFlag = IntFlag("ControlFlag", "MANAGED SETTLE")
Seen = IntFlag("Seen", "SHIM BYPASS")


class Usage(Structure):
    """One device on a usage page."""

    _fields_ = (("limit", u64), ("used", u64), ("peak", u64), ("refused", u64))


class Tally(Structure):
    """Bytes of one device, ever growing: asked for and granted; seen to be given by the driver."""

    _fields_ = (("admitted", u64), ("witnessed", u64))


class UsagePage(Structure):
    """One level's limits and usage: a frozen BPF map, written by BPF programs alone."""

    _fields_ = (
        ("version", u64),
        ("cgroup", u64),
        ("flags", u64),
        ("spare", u64 * 5),
        ("devices", Usage * DEVICES),
        ("verdicts", u64 * VERDICTS),
        ("tallies", Tally * DEVICES),
        ("tail", u64 * 280),
    )


class Device(Structure):
    """A device of a tenant; `index` is the ledger's."""

    _fields_ = (("uuid", u8 * 16), ("index", u32), ("spare", u32 * 3))


class Row(Structure):
    """One process of the tenant on one device; `pid` as the reader's pid namespace knows it."""

    _fields_ = (("pid", u32), ("device", u32), ("bytes", u64))


class ControlPage(Structure):
    """What the gatekeeper tells one process."""

    _fields_ = (
        ("version", u32),
        ("flags", u32),
        ("boot", u8 * 16),
        ("heartbeat_ns", u64),
        ("epoch", u64),
        ("device_count", u32),
        ("spare", u32 * 5),
        ("devices", Device * DEVICES),
        ("gates", u32 * DEVICES),
        ("sequence", u32),
        ("row_count", u32),
        ("spare2", u64),
        ("rows", Row * ROWS),
    )


class Status(Structure):
    """One device on a status page."""

    _fields_ = (("waiting", u32), ("drained", u32), ("launches", u64))


class StatusPage(Structure):
    """What one process says of itself: hints, never trusted."""

    _fields_ = (("version", u32), ("spare", u32 * 15), ("devices", Status * DEVICES))


class Hello(Structure):
    """The request of a shim; nothing in it is identity."""

    _fields_ = (("magic", u32), ("version", u16), ("size", u16), ("boot", u8 * 16), ("flags", u32), ("spare", u32 * 9))


class Answer(Structure):
    """The answer to a hello; descriptors travel beside it."""

    _fields_ = (
        ("magic", u32),
        ("version", u16),
        ("size", u16),
        ("code", u32),
        ("levels", u32),
        ("devices", u32),
        ("flags", u32),
        ("epoch", u64),
        ("spare", u64 * 12),
    )


class LevelDevice(Structure):
    """Key of `limits`."""

    _fields_ = (("cgroup", u64), ("device", u64))


class Limit(Structure):
    """Value of `limits`."""

    _fields_ = (("bytes", u64), ("flags", u64))


class FileKey(Structure):
    """Key of `files`."""

    _fields_ = (("dev", u64), ("ino", u64))


class Process(Structure):
    """Value of `processes`, by tgid."""

    _fields_ = (
        ("state", u64),
        ("generation", u64),
        ("levels", u64 * LEVELS),
        ("level_count", u32),
        ("flags", u32),
        ("last_device", u32),
        ("spare", u32),
        ("changes", u64),
        ("bytes", u64 * DEVICES),
        ("pool", u64 * DEVICES),
        ("vmm", u64 * DEVICES),
        ("overhead", s64 * DEVICES),
        ("contexts", u32 * DEVICES),
        ("retained", u32 * DEVICES),
        ("era", u32 * DEVICES),
        ("managed", u64 * DEVICES),
        ("primary", u32 * DEVICES),
        ("begun", u64),
    )


class AllocationKey(Structure):
    """Key of `allocations`."""

    _fields_ = (("tgid", u32), ("space", u32), ("generation", u64), ("handle", u64))


class Allocation(Structure):
    """Value of `allocations`."""

    _fields_ = (("bytes", u64), ("device", u32), ("era", u32), ("references", u64), ("owner", u64))


class Admission(Structure):
    """An admission that no driver call has settled yet; ticket 0: none."""

    _fields_ = (("ticket", u64), ("bytes", u64), ("device", u32), ("kind", u32), ("verdict", u64))


class Call(Structure):
    """The driver call that a thread is in; function 0: none."""

    _fields_ = (
        ("function", u64),
        ("arguments", u64 * 3),
        ("bytes", u64),
        ("device", u32),
        ("admitted", u32),
        ("references", u64),
    )


class Thread(Structure):
    """Value of `threads`."""

    _fields_ = (("admission", Admission), ("call", Call))


class CounterKey(Structure):
    """Key of `counters`."""

    _fields_ = (("cgroup", u64), ("device", u32), ("kind", u16), ("reason", u16))


_SEAL, _SHRINK, _GROW, _FUTURE_WRITE = fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, 0x10
_NOEXEC_SEAL = 0x8  # Linux 6.3; sysctl vm.memfd_noexec=2 refuses a memfd without it
_LIBC = ctypes.CDLL(None)


def _fence() -> None:
    """Order the stores before against those after: a foreign call gives the interpreter's lock away and takes it."""
    _LIBC.getppid()


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
    """A control page that this process alone can write: readers get `descriptor`, which no one can write through.

    `page` lies over the mapping and is gone after `close`; what was handed out stays readable. Raises OSError.
    """

    __slots__ = ("_map", "descriptor", "page")

    def __init__(self) -> None:
        fd = _sealable("fgpu-control")
        try:
            self._map = mmap.mmap(fd, PAGE_BYTES)  # before the seal, which refuses every later writable mapping
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SHRINK | _GROW | _FUTURE_WRITE | _SEAL)
            os.fchmod(fd, 0o444)
            self.descriptor = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(fd)
        self.page = ControlPage.from_buffer(self._map)

    def show(self, rows: bytes) -> None:
        """Replace the table of processes by `rows`, as `row_bytes` makes them, under the sequence word."""
        page = self.page
        page.sequence += 1
        _fence()
        ctypes.memmove(ctypes.addressof(page) + ControlPage.rows.offset, rows, len(rows))
        page.row_count = len(rows) // ctypes.sizeof(Row)
        _fence()
        page.sequence += 1

    def close(self) -> None:
        """Unmap and close; a view of the page still held elsewhere keeps the mapping until it goes."""
        os.close(self.descriptor)
        memory = self._map
        del self.page, self._map
        _unmap(memory)


class StatusMemory:
    """A status page: the tenant writes through `descriptor`, this process reads `page`. Raises OSError."""

    __slots__ = ("_map", "descriptor", "page")

    def __init__(self) -> None:
        self.descriptor = _sealable("fgpu-status")
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SHRINK | _GROW | _SEAL)
            self._map = mmap.mmap(self.descriptor, PAGE_BYTES)
        except OSError:
            os.close(self.descriptor)
            raise
        self.page = StatusPage.from_buffer(self._map)
        self.page.version = LAYOUT

    def close(self) -> None:
        """Unmap and close; a view of the page still held elsewhere keeps the mapping until it goes."""
        os.close(self.descriptor)
        memory = self._map
        del self.page, self._map
        _unmap(memory)


def _unmap(memory: mmap.mmap) -> None:
    with contextlib.suppress(BufferError):  # somebody looks at it still: the last view unmaps
        memory.close()


def row_bytes(rows: Iterable[tuple[int, int, int]]) -> bytes:
    """`(pid, device, bytes)` of each process and device, as `ControlMemory.show` wants them; at most ROWS are kept."""
    kept = list(rows)[:ROWS]
    return bytes((Row * len(kept))(*(Row(*row) for row in kept)))


def uuid_bytes(text: str) -> bytes:
    """The 16 bytes of a device's UUID, `GPU-…` as NVML writes it. Raises ValueError."""
    raw = bytes.fromhex(text.removeprefix("GPU-").replace("-", ""))
    if len(raw) != 16:
        raise ValueError(f"not the UUID of a device: {text!r}")
    return raw


def uuid_text(raw: bytes) -> str:
    """`GPU-…`, as NVML writes the UUID. Raises ValueError unless there are 16 bytes."""
    if len(raw) != 16:
        raise ValueError(f"a UUID has 16 bytes, not {len(raw)}")
    text = raw.hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
