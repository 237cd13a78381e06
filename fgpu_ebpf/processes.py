"""What the kernel has of a process: the values of the map `processes`.

Owns: which of their fields are of use here. Never: reads the map. Cannot fail.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from fgpu_ebpf import pages

_HEAD, _LEVELS = struct.Struct("6Q4I"), struct.Struct(f"{pages.LEVELS}Q")
_HOLDING = struct.Struct("Q2q8x3QqQ16x5Q")
_ZEROES = (0,) * pages.DEVICES
assert _HOLDING.size == ctypes.sizeof(pages.Holding)


@dataclass(frozen=True, slots=True)
class Process:
    """What one process is charged, in bytes per ledger index.

    `quiet`: none of its threads is between an admission and what settles it, or in a call that is witnessed. `changes`
    and `begun` count changes that are done and that have begun. `exported`: what other processes may have open.
    `ended`: contexts that ended while others went on. `peak`: the most that `bytes` was since the agent marked it.
    `handles`: bytes of VMM handles.
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
    begun: int = 0
    tag: int = 0
    exported: tuple[int, ...] = _ZEROES
    ended: tuple[int, ...] = _ZEROES
    peak: tuple[int, ...] = _ZEROES
    handles: tuple[int, ...] = _ZEROES

    def witnessed(self, device: int) -> int:
        """Bytes that NVML should show for it, but for what NVML alone knows."""
        return self.bytes[device] - self.overhead[device] - self.managed[device]

    def handles_in_no_row(self, device: int) -> int:
        """NVML names no process without a context; a row with its pid is of an ended process."""
        return 0 if self.contexts[device] else max(0, min(self.handles[device], self.witnessed(device)))


def levels_of(processes: Mapping[int, Process]) -> set[int]:
    """Every level that one of these is charged to."""
    return {level for process in processes.values() for level in process.levels}


def process_of(raw: bytes) -> Process:
    """A value of the map."""
    _, generation, changes, begun, turn, _, level_count, flags, _, tag = _HEAD.unpack_from(raw)
    levels = _LEVELS.unpack_from(raw, pages.Process.levels.offset)[:level_count]
    # Of each device, in the order of struct fgpu_holding; `one` and `other` are charged on either side.
    rows = zip(*_HOLDING.iter_unpack(raw[pages.Process.devices.offset :]), strict=True)
    bytes_, one, other, handles, managed, pool, overhead, contexts, pointers, shared, owed, ended, peak = rows
    late = any(owed) or any(one if turn & 1 else other)
    exported = tuple(map(sum, zip(pointers, shared, strict=True)))
    return Process(
        generation, levels, flags, changes, begun == changes, bytes_, overhead, managed, pool, contexts, late,
        begun, tag, exported, ended, peak, handles,
    )  # fmt: skip
