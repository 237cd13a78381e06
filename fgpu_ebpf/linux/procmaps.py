"""The mappings of a process.

The functions query one mapping at a time (PROCMAP_QUERY, Linux 6.11). On older kernels the functions parse
/proc/PID/maps. Both methods have a maximum, because a process can have any number of mappings. A read can block on the
process. Therefore the agent and the gatekeeper read in worker threads. The functions raise OSError with ENOENT if no
such mapping exists, and with E2BIG if there are too many mappings.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

MOST = 1 << 15
MOST_BYTES = 1 << 24  # of /proc/PID/maps: about 100,000 lines
File = tuple[int, int]  # (dev, ino) as in /proc/PID/maps
# The mapping to find. AT: the mapping that contains the address. NEXT_EXECUTABLE and NEXT_SHARED: the first mapping at
# or after the address that is executable, or shared and writable. These three constants find mappings of files only.
# NEXT_CODE: the first executable mapping at or after the address, with or without a file.
AT, NEXT_EXECUTABLE, NEXT_SHARED, NEXT_CODE = 0x20, 0x34, 0x3A, 0x14
_OR_NEXT, _OF_FILES = 0x10, 0x20
_MODES = {0x02: b"w", 0x04: b"x", 0x08: b"s"}
_PROCMAP_QUERY, _QUERY = 0xC0686611, struct.Struct("9Q4I2Q")  # Linux 6.11: struct procmap_query
_LONGEST_PATH, _CHUNK = 4096, 1 << 16
_Path = ctypes.c_char * _LONGEST_PATH


class Mapped(NamedTuple):
    """A mapping as the kernel reports it.

    `path` may end in ` (deleted)`, and may be empty if the caller did not request the path. `offset` is the offset in
    the file at which the mapping begins. `ino` is 0 if the mapping has no file.
    """

    start: int
    end: int
    dev: int
    ino: int
    path: bytes
    offset: int = 0


@contextlib.contextmanager
def opened(pid: int | str, file: str = "maps") -> Iterator[int]:
    """Open /proc/PID/FILE for reading, and yield its descriptor. Raise OSError if the process has exited.

    Args:
        pid: the process, or "self".
        file: the name of the file.
    """
    fd = os.open(f"/proc/{pid}/{file}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def find(maps: int, at: int, which: int = AT, named: bool = True) -> Mapped:
    """Return one mapping of a process. Raise OSError on failure.

    Args:
        maps: the open /proc/PID/maps.
        at: an address.
        which: AT or one of the NEXT constants.
        named: whether to report the path too.
    """
    try:
        return _ask(maps, at, which, named)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
    for mapped in _read(maps, which):
        if mapped.end > at and (which & _OR_NEXT or mapped.start <= at):
            return mapped
    raise FileNotFoundError(errno.ENOENT, "no such mapping")


def each(maps: int, which: int) -> Iterator[Mapped]:
    """Yield all mappings that a NEXT constant selects, by ascending address. Raise OSError on failure."""
    at = 0
    for _ in range(MOST):
        try:
            mapped = _ask(maps, at, which)
        except FileNotFoundError:  # the previous mapping was the last
            return
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            yield from _read(maps, which)
            return
        yield mapped
        at = mapped.end
    raise OSError(errno.E2BIG, "the process has too many mappings")


def with_names(maps: int, names: tuple[bytes, ...]) -> Iterator[Mapped]:
    """Yield executable mappings of files with base names that begin with one of `names`. Raise OSError on failure."""
    for found in each(maps, NEXT_EXECUTABLE):
        if found.path.rpartition(b"/")[2].startswith(names):
            yield found


def _ask(maps: int, at: int, which: int, named: bool = True) -> Mapped:
    path, query = _Path(), bytearray(_QUERY.size)
    address = ctypes.addressof(path) if named else 0
    _QUERY.pack_into(query, 0, _QUERY.size, which, at, *(0,) * 8, _LONGEST_PATH if named else 0, 0, address, 0)
    fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    _, _, _, start, end, _, _, offset, ino, major, minor, *_ = _QUERY.unpack(query)
    return Mapped(start, end, os.makedev(major, minor), ino, path.value, offset)


def _read(maps: int, which: int) -> Iterator[Mapped]:
    wanted = [mode for bit, mode in _MODES.items() if which & bit]
    for line in _text(maps).split(b"\n")[:-1]:  # names may contain other line separators
        span, modes, offset, device, ino, *path = line.split(None, 5)
        if (which & _OF_FILES and ino == b"0") or not all(mode in modes for mode in wanted):
            continue
        start, end = (int(word, 16) for word in span.split(b"-"))
        major, minor = (int(word, 16) for word in device.split(b":"))
        name = path[0].replace(b"\\012", b"\n") if path else b""  # the only character that the kernel escapes
        yield Mapped(start, end, os.makedev(major, minor), int(ino), name, int(offset, 16))


def _text(maps: int) -> bytes:
    os.lseek(maps, 0, os.SEEK_SET)
    parts, room = [], MOST_BYTES
    while room > 0 and (part := os.read(maps, _CHUNK)):
        parts.append(part)
        room -= len(part)
    if room <= 0:
        raise OSError(errno.E2BIG, "the process has too many mappings")
    return b"".join(parts)
