"""The memory bar of a device: a Snapshot's device -> the parts of its bar, and its figures as text.

`fgpu top` and the web page use this module. It does no I/O. The parts are, in this order: what tenants and the driver
hold, what others hold, what is committed beyond that. A number that was not measured is shown as `-`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fgpu_ebpf.policy.units import memory_text


class Ends(NamedTuple):
    """Return the end of each part of a bar, as a ratio of the device. A part that ends before it begins is empty."""

    used: float
    unmanaged: float
    committed: float


class Figures(NamedTuple):
    """The figures of a device as text. `turn` names the tenant whose turn it is; empty: no tenant has one."""

    used: str
    committed: str
    unmanaged: str
    turn: str


def ends(device: Mapping[str, Any]) -> Ends:
    """Return where the parts of the bar end: together they have the length of their sum, at most that of the device."""
    used, unmanaged = device["used_bytes"] or 0, device["unmanaged_bytes"] or 0
    capacity = device["capacity_bytes"] or 1
    found = (max(0, used - unmanaged), used, unmanaged + device["committed_bytes"])
    return Ends(*(min(1.0, end / capacity) for end in found))


def figures(device: Mapping[str, Any]) -> Figures:
    """Return `40GiB/160GiB`, `committed 100GiB`, `unmanaged 0B`, `turn: bob`."""
    return Figures(
        f"{_text(device['used_bytes'])}/{memory_text(device['capacity_bytes'])}",
        f"committed {_text(device['committed_bytes'])}",
        f"unmanaged {_text(device['unmanaged_bytes'])}",
        f"turn: {device['owner']}" if device["owner"] else "",
    )


def _text(number: int | None) -> str:
    return "-" if number is None else memory_text(number)
