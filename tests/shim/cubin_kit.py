"""ELF images of GPU modules."""

from __future__ import annotations

import struct


def cubin(*sections: tuple[str, int, int]) -> bytes:
    """Return an ELF file with these sections, each given by name, size and alignment."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name, _, _ in sections) + b".shstrtab\0"
    headers = [bytes(64)]
    at = 1
    for name, size, alignment in sections:
        headers.append(struct.pack("<IIQQQQIIQQ", at, 8, 0, 0, 64, size, 0, 0, alignment, 0))
        at += len(name) + 1
    headers.append(struct.pack("<IIQQQQIIQQ", at, 3, 0, 0, 64, len(names), 0, 0, 1, 0))
    begin = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 64 + len(names), 0, 64, 0, 0, 64, len(headers), len(headers) - 1
    )
    return begin + names + b"".join(headers)
