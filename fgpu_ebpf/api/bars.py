"""The memory bar of a device and the figures of the device as text, computed from a Snapshot's JSON.

This module runs in `fgpu top`, and in the agent's threads for the web page, and does no I/O. The parts of a bar are, in
this order: memory held by tenants and the driver, memory held by other processes, and committed memory that is not held
yet. A number that was not measured is shown as `-`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fgpu_ebpf.policy.units import memory_text


class Ends(NamedTuple):
    """The end of each part of a bar, as a ratio of the device's memory. A part that ends before its start is empty."""

    used: float
    unmanaged: float
    committed: float


class Figures(NamedTuple):
    """The figures of a device as text. `turn` names the tenant that has the turn, or is empty."""

    used: str
    committed: str
    unmanaged: str
    turn: str


def ends(device: Mapping[str, Any]) -> Ends:
    """Return the ends of the parts of a device's bar. An end is at most 1.

    Committed memory includes the memory of tenants, so the last part ends at unmanaged plus committed memory.
    """
    used, unmanaged = device["used_bytes"] or 0, device["unmanaged_bytes"] or 0
    capacity = device["capacity_bytes"] or 1
    found = (max(0, used - unmanaged), used, unmanaged + device["committed_bytes"])
    return Ends(*(min(1.0, end / capacity) for end in found))


def figures(device: Mapping[str, Any]) -> Figures:
    """Return the figures of a device, such as `40GiB/160GiB`, `committed 100GiB`, `unmanaged 0B`, `turn: bob`."""
    return Figures(
        f"{_text(device['used_bytes'])}/{memory_text(device['capacity_bytes'])}",
        f"committed {_text(device['committed_bytes'])}",
        f"unmanaged {_text(device['unmanaged_bytes'])}",
        f"turn: {device['owner']}" if device["owner"] else "",
    )


def _text(number: int | None) -> str:
    return "-" if number is None else memory_text(number)
