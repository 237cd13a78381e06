"""The ledger index of each device.

This module runs in the agent, at its start and when a lost device returns. A pinned UUID keeps its index, even if
NVML's number of the device has changed. If nothing is pinned, all indexes are free.
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
    """Return the ledger index of a device; None: every index belongs to another device.

    Indexes of known devices that do not respond stay reserved for these devices.

    Args:
        uuid: the device.
        number: the device's number in NVML, which is used as index if this index is free.
        known: indexes by UUID of devices that are or were present.
        used: indexes of devices that are present.
    """
    if uuid in known:
        return known[uuid]
    taken = {*known.values(), *used}
    return next((index for index in (number, *range(DEVICES)) if index < DEVICES and index not in taken), None)
