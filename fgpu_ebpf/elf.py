"""Where a shared library's exported functions are in its file. The file may be a tenant's, and say anything.

Owns: as much of the ELF format as that takes. Never: reads more than a driver library needs, or takes longer for it
than for one. When a file is not like one: ElfError, with what is wrong; no other error but OSError.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection

MOST_SEGMENTS, MOST_SECTIONS, MOST_SYMBOLS, MOST_NAME_BYTES = 64, 1024, 1 << 16, 1 << 22
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_IDENT = b"\x7fELF\x02\x01"  # 64 bits, the least significant byte first
_LOAD, _EXECUTABLE, _DYNSYM = 1, 1, 11


class ElfError(Exception):
    """What keeps a file from being a library whose functions can be found."""


def function_offsets(fd: int, names: Collection[str]) -> dict[str, int]:
    """File offsets of those of these functions that the library exports. Raises ElfError, OSError."""
    head = _read(fd, 0, _HEADER.size)
    ident, *_, segments_at, sections_at, _, _, _, n_segments, _, n_sections, _ = _HEADER.unpack(head)
    if not ident.startswith(_IDENT):
        raise ElfError("no ELF file of 64 bits")
    code = [
        (address, bytes_, at - address)
        for kind, flags, at, address, _, bytes_, _, _ in _table(fd, _SEGMENT, segments_at, n_segments, MOST_SEGMENTS)
        if kind == _LOAD and flags & _EXECUTABLE
    ]
    sections = _table(fd, _SECTION, sections_at, n_sections, MOST_SECTIONS)
    symbols, text = _symbols(fd, sections)
    wanted, found = {name.encode(): name for name in names}, {}
    longest = max(map(len, wanted), default=0) + 1
    for at, _, _, section, address, _ in symbols:
        name = wanted.get(text[at : at + longest].partition(b"\0")[0])
        if name and section and address:
            found[name] = _offset(name, address, code)
    return found


def _symbols(fd: int, sections: list[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], bytes]:
    """The dynamic symbols, and the text that their names are in."""
    table = next((section for section in sections if section[1] == _DYNSYM), None)
    if table is None or not 0 < table[6] < len(sections):
        raise ElfError("no dynamic symbols: is it a driver library?")
    _, _, _, _, text_at, text_bytes, *_ = sections[table[6]]
    if text_bytes > MOST_NAME_BYTES:
        raise ElfError(f"{text_bytes} bytes of names are more than the {MOST_NAME_BYTES} that are looked through")
    return _table(fd, _SYMBOL, table[4], table[5] // _SYMBOL.size, MOST_SYMBOLS), _read(fd, text_at, text_bytes)


def _offset(name: str, address: int, code: list[tuple[int, int, int]]) -> int:
    for begin, bytes_, shift in code:
        if begin <= address < begin + bytes_ and address + shift >= 0:
            return address + shift
    raise ElfError(f"{name} lies in no code")


def _table(fd: int, row: struct.Struct, at: int, count: int, most: int) -> list[tuple[int, ...]]:
    if count > most:
        raise ElfError(f"a table of {count} rows is longer than the {most} that are looked through")
    return list(row.iter_unpack(_read(fd, at, count * row.size)))


def _read(fd: int, at: int, bytes_: int) -> bytes:
    if at + bytes_ >= 1 << 63:
        raise ElfError("points out of any file")
    found = os.pread(fd, bytes_, at)
    if len(found) < bytes_:
        raise ElfError("ends too early")
    return found
