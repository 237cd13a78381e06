"""What fills a device's memory: a Snapshot's device -> the parts of its bar, and its figures as text.

Owns: the order of the parts: what tenants and the driver hold, what others hold, what is promised beyond. Never: draws.
A number that nobody measured is `-`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fgpu_ebpf.quantities import memory_text


class Ends(NamedTuple):
    """Where each part of a bar ends, as a part of the device; a part that ends before another does has no length."""

    used: float
    unmanaged: float
    committed: float


class Figures(NamedTuple):
    """The same as text, and whose turn it is; that is empty where it is nobody's."""

    used: str
    committed: str
    unmanaged: str
    turn: str


def ends(device: Mapping[str, Any]) -> Ends:
    """The three together are as long as their sum, and never longer than the device."""
    used, unmanaged = device["used_bytes"] or 0, device["unmanaged_bytes"] or 0
    capacity = device["capacity_bytes"] or 1
    found = (max(0, used - unmanaged), used, unmanaged + device["committed_bytes"])
    return Ends(*(min(1.0, end / capacity) for end in found))


def figures(device: Mapping[str, Any]) -> Figures:
    """`40GiB/160GiB`, `committed 100GiB`, `unmanaged 0B`, `turn: bob`."""
    return Figures(
        f"{_text(device['used_bytes'])}/{memory_text(device['capacity_bytes'])}",
        f"committed {_text(device['committed_bytes'])}",
        f"unmanaged {_text(device['unmanaged_bytes'])}",
        f"turn: {device['owner']}" if device["owner"] else "",
    )


def _text(number: int | None) -> str:
    return "-" if number is None else memory_text(number)
