"""The ledger index of each device.

The agent uses this module at its start and when a lost device returns. A UUID that is pinned keeps its index, whatever
number NVML gives to the device now. If nothing is pinned, all indexes are free.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from fgpu_ebpf.abi import DEVICES
from fgpu_ebpf.driver import other_layouts
from fgpu_ebpf.ledger.ledger import Ledger, LedgerMissing


def pinned(pins: Path) -> dict[bytes, int]:
    """Return the ledger index by UUID of the devices that earlier agents, of any layout, have pinned."""
    try:
        ledger = Ledger(pins)
    except (LedgerMissing, OSError):
        return other_layouts.devices(pins)
    try:
        return other_layouts.devices(pins) | {uuid: index for index, uuid in ledger.devices()}
    finally:
        ledger.close()


def index_of(uuid: bytes, number: int, known: Mapping[bytes, int], used: Collection[int]) -> int | None:
    """Return the index of a device that NVML lists at `number`; None: every index belongs to another device.

    Indexes of known devices that do not answer stay free for them.
    """
    if uuid in known:
        return known[uuid]
    taken = {*known.values(), *used}
    return next((index for index in (number, *range(DEVICES)) if index < DEVICES and index not in taken), None)
