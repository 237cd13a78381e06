"""Requests of the simulated driver's protocol."""

from __future__ import annotations

import struct

REQUEST = struct.Struct("<IIIIQQQIIQQ")
MAGIC = 0x66677332
HELLO, DEVICE, ATTACH, TAKE, GIVE, CLOSE, MEMORY, PROCESSES, DUMP, WORK = range(10)
CONTEXT, BLOCK = 0, 1


def request(
    op: int, device: int = 0, kind: int = 0, context: int = 0, size: int = 0, asked: int = 0, flags: int = 0
) -> bytes:
    return REQUEST.pack(MAGIC, op, device, kind, context, size, asked, flags, 0, 0, 0)
