"""Reader of a shared library's dynamic segment: the name of the library, and the file offsets of its functions.

A loader reads the same segment. Section headers are ignored, as a loader ignores section headers, because section
headers can be absent or wrong. The file may belong to a tenant and contain anything. Therefore every read and the work
for one name are bounded, and no file takes longer than a driver's library. General-purpose ELF parsers have no such
bounds. This module runs in all threads of the agent, and in the commands.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

MOST_SEGMENTS, MOST_ENTRIES, MOST_SYMBOLS, MOST_NAME_BYTES = 64, 1024, 1024, 256
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_ENTRY = struct.Struct("<QQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_GNU, _SYSV = struct.Struct("<4I"), struct.Struct("<2I")
_WORD = struct.Struct("<I")
_IDENT = b"\x7fELF\x02\x01"  # 64 bits, the least significant byte first
_LOAD, _DYNAMIC, _EXECUTABLE = 1, 2, 1
_HASH, _STRTAB, _SYMTAB, _SONAME, _GNU_HASH = 4, 5, 6, 14, 0x6FFFFEF5
_32_BITS = (1 << 32) - 1


class ElfError(Exception):
    """The file is not a library in which functions can be found. The text has the reason."""


class Segment(NamedTuple):
    """A part of the file that a loader maps, in bytes: its offset in the file, its address, and its length."""

    offset: int
    address: int
    bytes: int
    executable: bool


def function_offsets(fd: int, names: Collection[str]) -> dict[str, int]:
    """Return the file offsets of the functions in `names` that the library exports.

    Raise ElfError or OSError on failure.
    """
    library = Library(fd)
    found = {name: library.offset(name) for name in names}
    return {name: offset for name, offset in found.items() if offset is not None}


class Library:
    """The dynamic segment of an open file. The constructor raises ElfError if the file is not a shared library."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        ident, *_, at, _, _, _, _, count, _, _, _ = _HEADER.unpack(self._read_file(0, _HEADER.size))
        if not ident.startswith(_IDENT):
            raise ElfError("not a 64-bit ELF file")
        rows = list(self._segments(at, count))
        self._loaded = [Segment(offset, address, bytes_, bool(flags & _EXECUTABLE))
                        for kind, flags, offset, address, _, bytes_, _, _ in rows if kind == _LOAD]  # fmt: skip
        dynamic = next(((row[3], row[5]) for row in rows if row[0] == _DYNAMIC), None)
        if dynamic is None:
            raise ElfError("no dynamic segment: not a shared library")
        self._entries = dict(self._dynamic(*dynamic))

    def _segments(self, at: int, count: int) -> Iterator[tuple[int, ...]]:
        if count > MOST_SEGMENTS:
            raise ElfError(f"{count} segments, more than the {MOST_SEGMENTS} that fgpu reads")
        return _SEGMENT.iter_unpack(self._read_file(at, count * _SEGMENT.size))

    def _dynamic(self, address: int, bytes_: int) -> Iterator[tuple[int, int]]:
        if bytes_ > MOST_ENTRIES * _ENTRY.size:
            raise ElfError(f"{bytes_ // _ENTRY.size} dynamic entries, more than the {MOST_ENTRIES} that fgpu reads")
        for tag, value in _ENTRY.iter_unpack(self._read(address, bytes_ // _ENTRY.size * _ENTRY.size)):
            if not tag:
                return
            yield tag, value

    # -- its names

    @property
    def name(self) -> str:
        """DT_SONAME, the name by which programs request the library; empty if the library has no name."""
        at = self._entries.get(_SONAME)
        return "" if at is None else self._text(at).decode(errors="replace")

    def offset(self, name: str) -> int | None:
        """Return the file offset of a function, or None if the function is not exported.

        Raise ElfError if the address is not code.
        """
        for address in map(self._defined_at, self._candidates(name.encode())):
            if address:
                return self._code_offset(name, address)
        return None

    def _candidates(self, name: bytes) -> Iterator[int]:
        """Yield the indices of the symbols with the name `name`."""
        chain = self._gnu_chain(name) if _GNU_HASH in self._entries else self._sysv_chain(name)
        for index in chain:
            (at, *_) = _SYMBOL.unpack(self._symbol(index))
            if self._read(self._entry(_STRTAB) + at, len(name) + 1) == name + b"\0":
                yield index

    def _defined_at(self, index: int) -> int:
        """Return the address of a symbol, or 0 if another library defines the symbol."""
        _, _, _, section, address, _ = _SYMBOL.unpack(self._symbol(index))
        return int(address) if section else 0

    def _symbol(self, index: int) -> bytes:
        return self._read(self._entry(_SYMTAB) + index * _SYMBOL.size, _SYMBOL.size)

    def _gnu_chain(self, name: bytes) -> Iterator[int]:
        table, wanted = self._entry(_GNU_HASH), gnu_hash(name)
        buckets, first, words, _ = _GNU.unpack(self._read(table, _GNU.size))
        if not buckets:
            raise ElfError("a hash table without buckets")
        at = table + _GNU.size + words * 8
        index = self._word(at + wanted % buckets * _WORD.size)
        if index < first:  # the bucket is empty
            return
        at += buckets * _WORD.size
        for n in range(index, index + MOST_SYMBOLS):
            found = self._word(at + (n - first) * _WORD.size)
            if found | 1 == wanted | 1:
                yield n
            if found & 1:
                return
        raise ElfError(f"a chain of the hash table has more than {MOST_SYMBOLS} symbols")

    def _sysv_chain(self, name: bytes) -> Iterator[int]:
        table = self._entry(_HASH)
        buckets, chains = _SYSV.unpack(self._read(table, _SYSV.size))
        if not buckets:
            raise ElfError("a hash table without buckets")
        at = table + _SYSV.size
        index = self._word(at + sysv_hash(name) % buckets * _WORD.size)
        for _ in range(MOST_SYMBOLS):
            if not index or index >= chains:
                return
            yield index
            index = self._word(at + (buckets + index) * _WORD.size)
        raise ElfError(f"a chain of the hash table has more than {MOST_SYMBOLS} symbols")

    # -- its bytes

    def _entry(self, tag: int) -> int:
        try:
            return self._entries[tag]
        except KeyError:
            raise ElfError(f"no entry {tag} in the dynamic segment: no symbol can be found") from None

    def _code_offset(self, name: str, address: int) -> int:
        for s in self._loaded:
            if s.executable and s.address <= address < s.address + s.bytes:
                return s.offset + address - s.address
        raise ElfError(f"the address of {name} is in no executable segment")

    def _text(self, at: int) -> bytes:
        """Return a name, cut to MOST_NAME_BYTES."""
        address = self._entry(_STRTAB) + at
        room = next(
            (s.address + s.bytes - address for s in self._loaded if s.address <= address < s.address + s.bytes), 0
        )
        return self._read(address, min(room, MOST_NAME_BYTES)).partition(b"\0")[0]

    def _word(self, address: int) -> int:
        return int(_WORD.unpack(self._read(address, _WORD.size))[0])

    def _read(self, address: int, bytes_: int) -> bytes:
        for s in self._loaded:
            if s.address <= address and address + bytes_ <= s.address + s.bytes:
                return self._read_file(s.offset + address - s.address, bytes_)
        raise ElfError("an address outside the loaded segments")

    def _read_file(self, at: int, bytes_: int) -> bytes:
        if at + bytes_ >= 1 << 63:
            raise ElfError("an offset beyond any file")
        found = os.pread(self._fd, bytes_, at)
        if len(found) < bytes_:
            raise ElfError("the file is too short")
        return found


def gnu_hash(name: bytes) -> int:
    """Return the hash of a name in a DT_GNU_HASH table."""
    value = 5381
    for byte in name:
        value = value * 33 + byte & _32_BITS
    return value


def sysv_hash(name: bytes) -> int:
    """Return the hash of a name in a DT_HASH table."""
    value = 0
    for byte in name:
        value = (value << 4) + byte
        value = (value ^ (value >> 24 & 0xF0)) & 0x0FFFFFFF
    return value
