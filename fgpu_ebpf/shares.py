"""Shares by name: what a container asks for with `--device fgpu.dev/share=8gib-50pct`, or of one device alone with
`--device fgpu.dev/share=8gib-50pct:GPU-…`.

Owns: what such a name means; there is no table that could say otherwise. Never: does I/O. On failure: QuantityError
with what would be right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fgpu_ebpf import quantities
from fgpu_ebpf.quantities import Amount, QuantityError, shown

_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{1,4})?"
_UUID = "GPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_NAME = re.compile(
    rf"(?P<plain>(?:(?P<size>{_NUMBER})(?P<unit>[mg]ib|pct)|all)(?:-(?P<time>{_NUMBER})pct)?)(?::(?P<device>{_UUID}))?"
)
_UNITS = {"mib": "MiB", "gib": "GiB", "pct": "%"}
USUAL = ("2gib", "4gib", "8gib", "12gib", "25pct-25pct", "50pct-50pct")


@dataclass(frozen=True, slots=True)
class Share:
    """A limit of memory and a ceiling of time as people write them; empty: nothing is said of it.

    `device`: the UUID of the only one that it is of; empty: of each.
    """

    name: str
    memory: str
    compute: str
    device: str = ""

    @property
    def text(self) -> str:
        """The name, with the device's behind it."""
        return bound(self.name, self.device) if self.device else self.name

    @property
    def amount(self) -> Amount | None:
        """The limit of memory."""
        return quantities.amount(self.memory) if self.memory else None

    @property
    def limit_millionths(self) -> int | None:
        """The ceiling of time."""
        return quantities.millionths(self.compute) if self.compute else None


def parse(name: str) -> Share:
    """`8gib`, `1536mib-25pct`, `50pct-50pct` (memory, then compute time) or `all-50pct` (compute time alone).

    With `:GPU-…` behind it: of that device, and nothing of others. Raises QuantityError.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match["size"] is None and match["time"] is None):
        raise QuantityError(f"{shown(name)} is no share: write it as 8gib, 8gib-50pct, 50pct-50pct or all-50pct")
    memory = f"{match['size']}{_UNITS[match['unit']]}" if match["size"] else ""
    share = Share(match["plain"], memory, f"{match['time']}%" if match["time"] else "", match["device"] or "")
    _ = share.amount, share.limit_millionths  # a fault shows now, not when a container starts
    return share


def bound(name: str, device: str) -> str:
    """The name of a share of one device, by its UUID."""
    return f"{name}:{device}"
