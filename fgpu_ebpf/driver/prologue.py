"""The offset from the beginning of a function at which a uprobe is cheap.

A uprobe on an instruction that the kernel does not emulate is executed out of line, step by step: some 10 us a hit in
place of half of one. Drivers before 580, and after it, begin every call with a test whether they have ended (`cmpl
$imm, disp(%rip)`), which is not emulated, and then a conditional jump, which is. Nothing has changed at that point: the
arguments are in their registers, and the return address is on top of the stack. A probe is never moved past a jump or
past an instruction that changes the stack; any other beginning is probed at its first byte.

`probe_plan` uses this module.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

CODE_BYTES = 16
_COMPARES = {b"\x81\x3d": 10, b"\x83\x3d": 7}  # with their lengths in bytes
_EMULATED = frozenset([*range(0x70, 0x80), *range(0x50, 0x58)])  # short jcc; push


def shift(code: bytes) -> int:
    """Return how many bytes after its first byte a function with this code is probed. x86-64."""
    length = _COMPARES.get(code[:2], 0)
    return length if code[length : length + 1] and code[length] in _EMULATED else 0


def shifted(fd: int, offsets: Mapping[str, int]) -> dict[str, int]:
    """Return the offsets in the library's file at which its functions are probed. Raises OSError."""
    return {name: at + shift(os.pread(fd, CODE_BYTES, at)) for name, at in offsets.items()}
