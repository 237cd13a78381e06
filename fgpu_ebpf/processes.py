"""What the kernel has of a process: the values of the map `processes`.

Owns: which of their fields are of use here. Never: reads the map. Cannot fail.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

from fgpu_ebpf import pages

_HEAD, _LEVELS = struct.Struct("6Q2I"), struct.Struct(f"{pages.LEVELS}Q")
_HOLDING = struct.Struct("Q2q16x2QqQ32xQ16x")
assert _HOLDING.size == ctypes.sizeof(pages.Holding)


@dataclass(frozen=True, slots=True)
class Process:
    """What one process is charged, in bytes per ledger index.

    `quiet`: none of its threads is between an admission and what settles it, or in a call that is witnessed.
    """

    generation: int
    levels: tuple[int, ...]
    flags: int
    changes: int
    quiet: bool
    bytes: tuple[int, ...]
    overhead: tuple[int, ...]
    managed: tuple[int, ...]
    pool: tuple[int, ...]
    contexts: tuple[int, ...]
    late: bool = False  # for its last move: some of it was charged or released in the middle of that

    def witnessed(self, device: int) -> int:
        """Bytes that NVML should show for it, but for what NVML alone knows."""
        return self.bytes[device] - self.overhead[device] - self.managed[device]


def process_of(raw: bytes) -> Process:
    """A value of the map."""
    _, generation, changes, begun, turn, _, level_count, flags = _HEAD.unpack_from(raw)
    levels = _LEVELS.unpack_from(raw, pages.Process.levels.offset)[:level_count]
    # Of each device: bytes, charged on either side, managed, pool, overhead, contexts, owed.
    rows = _HOLDING.iter_unpack(raw[pages.Process.devices.offset :])
    bytes_, left, right, managed, pool, overhead, contexts, owed = zip(*rows, strict=True)
    late = any(owed) or any(left if turn & 1 else right)
    return Process(
        generation, levels, flags, changes, begun == changes, bytes_, overhead, managed, pool, contexts, late
    )
