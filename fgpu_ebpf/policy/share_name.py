"""Names of shares, as in `--device fgpu.dev/share=8gib-50pct`.

A share of one device alone is written as `--device fgpu.dev/share=8gib-50pct:GPU-…`. The name is the definition; there
is no table. The agent, the device plugin and the commands use this module. QuantityError says what would be right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fgpu_ebpf.policy import units
from fgpu_ebpf.policy.units import Amount, QuantityError, shown

_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{1,4})?"
_UUID = "GPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_NAME = re.compile(
    rf"(?P<plain>(?:(?P<size>{_NUMBER})(?P<unit>[mg]ib|pct)|all)(?:-(?P<time>{_NUMBER})pct)?)(?::(?P<device>{_UUID}))?"
)
_UNITS = {"mib": "MiB", "gib": "GiB", "pct": "%"}
USUAL = ("2gib", "4gib", "8gib", "12gib", "25pct-25pct", "50pct-50pct")


@dataclass(frozen=True, slots=True)
class Share:
    """A limit of memory and a ceiling of time as texts; an empty text sets neither.

    `device`: the UUID of the only device that it applies to; empty: all devices.
    """

    name: str
    memory: str
    compute: str
    device: str = ""

    @property
    def text(self) -> str:
        """The name, with the device's after it."""
        return bound(self.name, self.device) if self.device else self.name

    @property
    def amount(self) -> Amount | None:
        """The limit of memory."""
        return units.amount(self.memory) if self.memory else None

    @property
    def limit_millionths(self) -> int | None:
        """The ceiling of time."""
        return units.millionths(self.compute) if self.compute else None


def parse(name: str) -> Share:
    """Parse a name of a share. Raises QuantityError.

    `8gib`, `1536mib-25pct` and `50pct-50pct` are memory and compute time, `all-50pct` is compute time alone. With
    `:GPU-…` after it, the share applies to that device only.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match["size"] is None and match["time"] is None):
        raise QuantityError(f"{shown(name)} is not a share: write it as 8gib, 8gib-50pct, 50pct-50pct or all-50pct")
    memory = f"{match['size']}{_UNITS[match['unit']]}" if match["size"] else ""
    share = Share(match["plain"], memory, f"{match['time']}%" if match["time"] else "", match["device"] or "")
    _ = share.amount, share.limit_millionths  # an error is raised now, not when a container starts
    return share


def bound(name: str, device: str) -> str:
    """Return the name of a share of one device, by its UUID."""
    return f"{name}:{device}"
