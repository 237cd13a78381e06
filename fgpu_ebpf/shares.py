"""Shares by name: what a container asks for with `--device fgpu.dev/share=8gib-50pct`.

Owns: what such a name means; there is no table that could say otherwise. Never: does I/O. On failure: QuantityError
with what would be right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fgpu_ebpf import quantities
from fgpu_ebpf.quantities import Amount, QuantityError, shown

_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{1,4})?"
_NAME = re.compile(rf"(?:(?P<size>{_NUMBER})(?P<unit>[mg]ib|pct)|all)(?:-(?P<time>{_NUMBER})pct)?")
_UNITS = {"mib": "MiB", "gib": "GiB", "pct": "%"}
USUAL = ("2gib", "4gib", "8gib", "12gib", "25pct-25pct", "50pct-50pct")


@dataclass(frozen=True, slots=True)
class Share:
    """A limit of memory and a ceiling of time as people write them; empty: nothing is said of it."""

    name: str
    memory: str
    compute: str

    @property
    def amount(self) -> Amount | None:
        """The limit of memory."""
        return quantities.amount(self.memory) if self.memory else None

    @property
    def limit_millionths(self) -> int | None:
        """The ceiling of time."""
        return quantities.millionths(self.compute) if self.compute else None


def parse(name: str) -> Share:
    """`8gib`, `1536mib-25pct`, `50pct-50pct` (memory, then compute time) or `all-50pct` (compute time alone)."""
    match = _NAME.fullmatch(name)
    if match is None or (match["size"] is None and match["time"] is None):
        raise QuantityError(f"{shown(name)} is no share: write it as 8gib, 8gib-50pct, 50pct-50pct or all-50pct")
    memory = f"{match['size']}{_UNITS[match['unit']]}" if match["size"] else ""
    share = Share(name, memory, f"{match['time']}%" if match["time"] else "")
    _ = share.amount, share.limit_millionths  # a fault shows now, not when a container starts
    return share
