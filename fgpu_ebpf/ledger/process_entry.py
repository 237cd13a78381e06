"""The kernel's entry of a process: a value of the map `processes`.

This module runs in any thread that reads the ledger's processes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from fgpu_ebpf import abi

# The module uses struct instead of abi.Process for speed: every reconciliation reads all entries.
_HEAD, _LEVELS = struct.Struct("6Q4I"), struct.Struct(f"{abi.LEVELS}Q")
_HOLDING = struct.Struct("Q2q8x3QqQ16x5Q")
_FLAGS = (1 << abi.UNSEEN_SHIFT) - 1
_ZEROES = (0,) * abi.DEVICES
assert (_HEAD.size, _HOLDING.size) == (abi.Process.sides.offset, ctypes.sizeof(abi.Holding))


@dataclass(frozen=True, slots=True)
class Process:
    """The charges of one process, in bytes by ledger index.

    `quiet`: no thread of the process is in a probed call, or between an admission and the admitted call. `changes`:
    number of completed changes. `begun`: number of changes that have begun. `exported`: bytes that other processes may
    have open. `ended`: number of contexts that were destroyed while other contexts remained. `peak`: the maximum of
    `bytes` since the agent last called Ledger.mark(). `handles`: bytes of VMM handles. `parked`: bytes of the process
    that no device holds. These bytes are not in `bytes`, but are in the other parts. `unseen`: the devices, as bits, on
    which `contexts` counts a context without a recorded creation.
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
    late: bool = False  # charges or releases made during the last move are not at the new levels yet
    begun: int = 0
    tag: int = 0
    exported: tuple[int, ...] = _ZEROES
    ended: tuple[int, ...] = _ZEROES
    peak: tuple[int, ...] = _ZEROES
    handles: tuple[int, ...] = _ZEROES
    parked: tuple[int, ...] = _ZEROES
    unseen: int = 0

    @property
    def is_parked(self) -> bool:
        """Return whether the agent parks or has parked the process. NVML may show all or no memory of the process."""
        return bool(self.flags & abi.PARKED)

    def is_unseen(self, device: int) -> bool:
        """Return whether a context without a recorded creation counts on the device."""
        return bool(self.unseen >> device & 1)

    def recorded_contexts(self, device: int) -> int:
        """Return the number of contexts on the device with a recorded creation."""
        return self.contexts[device] - self.is_unseen(device)

    def witnessed(self, device: int) -> int:
        """Return the bytes, without overhead, that NVML should show for the process on a device."""
        return self.bytes[device] - self.overhead[device] - self.managed[device]

    def handles_in_no_row(self, device: int) -> int:
        """Return the bytes of handles that no row of NVML shows, because NVML lists only processes with a context.

        A row with the pid of a process without a context belongs to an exited process.
        """
        return 0 if self.contexts[device] else max(0, min(self.handles[device], self.witnessed(device)))


def levels_of(processes: Mapping[int, Process]) -> set[int]:
    """Return all levels to which these processes are charged."""
    return {level for process in processes.values() for level in process.levels}


def process_of(raw: bytes) -> Process:
    """Decode a value of the map `processes`."""
    _, generation, changes, begun, turn, _, level_count, flags, _, tag = _HEAD.unpack_from(raw)
    levels = _LEVELS.unpack_from(raw, abi.Process.levels.offset)[:level_count]
    # Each row has one field for all devices, in the order of struct fgpu_holding. `one` and `other` are the two sides
    # of the charges.
    rows = zip(*_HOLDING.iter_unpack(raw[abi.Process.devices.offset :]), strict=True)
    bytes_, one, other, handles, managed, pool, overhead, contexts, pointers, shared, owed, ended, peak = rows
    late = any(owed) or any(one if turn & 1 else other)
    exported = tuple(map(sum, zip(pointers, shared, strict=True)))
    parked = _ZEROES
    if flags & abi.PARKED:
        parked = tuple(max(0, all_ + late_ - a - b) for all_, late_, a, b in zip(bytes_, owed, one, other, strict=True))
        bytes_ = tuple(all_ - part for all_, part in zip(bytes_, parked, strict=True))
    return Process(
        generation, levels, flags & _FLAGS, changes, begun == changes, bytes_, overhead, managed, pool, contexts, late,
        begun, tag, exported, ended, peak, handles, parked, flags >> abi.UNSEEN_SHIFT,
    )  # fmt: skip
