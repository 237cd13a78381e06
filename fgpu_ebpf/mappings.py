"""The mapped files of a process: one asked for at a time, or, where the kernel knows no such question (Linux before
6.11), out of the text of all.

Owns: the question, and the parsing of /proc/PID/maps, bounded by what a process can make of it. Never: decides whose
file it is. On failure: OSError: ENOENT, there is none such; E2BIG, absurdly many.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

MOST = 1 << 15
MOST_BYTES = 1 << 24  # of text: 100,000 lines
File = tuple[int, int]  # (dev, ino), as /proc/PID/maps names it
# Which one: that at the address, or the first behind it that is executable, or that is shared and may be written; all
# three of files alone, and then the first executable one of a file or of none.
AT, NEXT_EXECUTABLE, NEXT_SHARED, NEXT_CODE = 0x20, 0x34, 0x3A, 0x14
_OR_NEXT, _OF_FILES = 0x10, 0x20
_MODES = {0x02: b"w", 0x04: b"x", 0x08: b"s"}
_PROCMAP_QUERY, _QUERY = 0xC0686611, struct.Struct("9Q4I2Q")  # Linux 6.11: struct procmap_query
_LONGEST_PATH, _CHUNK = 4096, 1 << 16
_Path = ctypes.c_char * _LONGEST_PATH


@dataclass(frozen=True, slots=True)
class Mapped:
    """A mapping, as the kernel names it: `path` may end in ` (deleted)`, and is empty where it was not asked for.

    `offset`: where in the file it begins. A mapping of no file has the inode 0.
    """

    start: int
    end: int
    dev: int
    ino: int
    path: bytes
    offset: int = 0


def find(maps: int, at: int, which: int = AT, named: bool = True) -> Mapped:
    """A mapping of an open /proc/PID/maps. Raises OSError."""
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
    """One mapping after the other. Raises OSError."""
    at = 0
    for _ in range(MOST):
        try:
            mapped = _ask(maps, at, which)
        except FileNotFoundError:  # that was the last
            return
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            yield from _read(maps, which)
            return
        yield mapped
        at = mapped.end
    raise OSError(errno.E2BIG, "too many mappings")


def _ask(maps: int, at: int, which: int, named: bool = True) -> Mapped:
    room, query = _Path(), bytearray(_QUERY.size)
    name = ctypes.addressof(room) if named else 0
    _QUERY.pack_into(query, 0, _QUERY.size, which, at, *(0,) * 8, _LONGEST_PATH if named else 0, 0, name, 0)
    fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    _, _, _, start, end, _, _, offset, ino, major, minor, *_ = _QUERY.unpack(query)
    return Mapped(start, end, os.makedev(major, minor), ino, room.value, offset)


def _read(maps: int, which: int) -> Iterator[Mapped]:
    wanted = [mode for bit, mode in _MODES.items() if which & bit]
    for line in _text(maps).split(b"\n")[:-1]:  # names may have other ends of lines
        place, modes, offset, device, ino, *path = line.split(None, 5)
        if (which & _OF_FILES and ino == b"0") or not all(mode in modes for mode in wanted):
            continue
        start, end = (int(word, 16) for word in place.split(b"-"))
        major, minor = (int(word, 16) for word in device.split(b":"))
        name = path[0].replace(b"\\012", b"\n") if path else b""  # the one character that is escaped there
        yield Mapped(start, end, os.makedev(major, minor), int(ino), name, int(offset, 16))


def _text(maps: int) -> bytes:
    os.lseek(maps, 0, os.SEEK_SET)
    parts, room = [], MOST_BYTES
    while room > 0 and (part := os.read(maps, _CHUNK)):
        parts.append(part)
        room -= len(part)
    if room <= 0:
        raise OSError(errno.E2BIG, "too many mappings")
    return b"".join(parts)
