"""Which ledger index belongs to which device.

Used by the agent when it starts. Owns: the rule that a pinned UUID keeps its index, whatever number NVML gives the
device now. On failure: nothing pinned means no index is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from fgpu_ebpf.ledger import Ledger, LedgerMissing
from fgpu_ebpf.pages import DEVICES


def pinned(pins: Path) -> dict[bytes, int]:
    """The ledger index by UUID, of the devices that an earlier agent has named in the kernel."""
    try:
        ledger = Ledger(pins)
    except (LedgerMissing, OSError):
        return {}
    try:
        return {uuid: index for index, uuid in ledger.devices()}
    finally:
        ledger.close()


def index_of(uuid: bytes, number: int, known: Mapping[bytes, int], used: Collection[int]) -> int | None:
    """The index of a device that NVML lists at `number`; None: every index belongs to another device.

    Indexes of known devices that do not answer stay free for them.
    """
    if uuid in known:
        return known[uuid]
    taken = {*known.values(), *used}
    return next((index for index in (number, *range(DEVICES)) if index < DEVICES and index not in taken), None)
