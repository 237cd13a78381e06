"""Copies of the driver's libraries as a tenant may make them: functions have other names, and loaders accept the file.

The code handles only the parts of the ELF format that are needed to rename exported functions.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

_DYNAMIC, _STRTAB, _SYMTAB, _GNU_HASH = 2, 5, 6, 0x6FFFFEF5
_SYMBOL_BYTES = 24


def with_other_names(library: bytes, names: Mapping[str, str]) -> bytes:
    """Return the library with these exported functions renamed. A new name must not be longer than the old one."""
    text = bytearray(library)
    tables = _dynamic(text)
    strings, symbols, table = (_offset(text, tables[tag]) for tag in (_STRTAB, _SYMTAB, _GNU_HASH))
    buckets, first, words = struct.unpack_from("<3I", text, table)
    count = _count(text, table, buckets, first, words)
    places = [struct.unpack_from("<I", text, symbols + n * _SYMBOL_BYTES)[0] for n in range(count)]
    for name, other in names.items():
        at = text.index(b"\0" + name.encode() + b"\0", strings) + 1
        assert len(other) <= len(name)
        assert not any(at - strings < place <= at - strings + len(name) for place in places), (
            "another name ends on this one"
        )
        text[at : at + len(name)] = other.encode().ljust(len(name), b"\0")
    _hash_anew(text, table, first, words, [_name(text, strings + place) for place in places[first:]])
    return bytes(text)


def _dynamic(text: bytes) -> dict[int, int]:
    at, count = struct.unpack_from("<Q", text, 0x20)[0], struct.unpack_from("<H", text, 56)[0]
    rows = [struct.unpack_from("<IIQQQQ", text, at + 56 * n) for n in range(count)]
    offset, size = next((row[2], row[5]) for row in rows if row[0] == _DYNAMIC)
    return dict(struct.iter_unpack("<QQ", text[offset : offset + size]))


def _offset(text: bytes, address: int) -> int:
    at, count = struct.unpack_from("<Q", text, 0x20)[0], struct.unpack_from("<H", text, 56)[0]
    rows = [struct.unpack_from("<IIQQQQ", text, at + 56 * n) for n in range(count)]
    return next(row[2] + address - row[3] for row in rows if row[0] == 1 and row[3] <= address < row[3] + row[5])


def _count(text: bytes, table: int, buckets: int, first: int, words: int) -> int:
    """Return the number of dynamic symbols: the last chain ends with the last symbol."""
    at = table + 16 + words * 8
    last = max(struct.unpack_from(f"<{buckets}I", text, at))
    while not struct.unpack_from("<I", text, at + 4 * (buckets + last - first))[0] & 1:
        last += 1
    return last + 1


def _name(text: bytes, at: int) -> bytes:
    return bytes(text[at : text.index(b"\0", at)])


def _hash_anew(text: bytearray, table: int, first: int, words: int, names: list[bytes]) -> None:
    """Replace the hash table by a table with a single bucket, which needs no more space."""
    struct.pack_into("<I", text, table, 1)
    text[table + 16 : table + 16 + words * 8] = b"\xff" * (words * 8)
    chain = [_hash(name) & ~1 for name in names]
    chain[-1] |= 1
    struct.pack_into(f"<{1 + len(chain)}I", text, table + 16 + words * 8, first, *chain)


def _hash(name: bytes) -> int:
    value = 5381
    for byte in name:
        value = (value * 33 + byte) & 0xFFFFFFFF
    return value
