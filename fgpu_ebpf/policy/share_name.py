"""The names of shares, as in `--device fgpu.dev/share=8gib-50pct`.

A share of a single device has the UUID of the device in its name: `--device fgpu.dev/share=8gib-50pct:GPU-…`. A name
contains the whole definition of its share, so there is no table of shares. The functions have no state, and run in the
agent, the device plugin and the commands.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fgpu_ebpf.policy import units
from fgpu_ebpf.policy.units import Amount, QuantityError, shown

_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{1,4})?"
_UUID = "GPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_NAME = re.compile(
    rf"(?P<plain>(?:(?P<size>{_NUMBER})(?P<unit>[mg]ib|pct)|all)(?:-(?P<time>{_NUMBER})pct)?)(?::(?P<device>{_UUID}))?"
)
_UNITS = {"mib": "MiB", "gib": "GiB", "pct": "%"}
USUAL = ("2gib", "4gib", "8gib", "12gib", "25pct-25pct", "50pct-50pct")


class Share(NamedTuple):
    """A limit of memory and a ceiling of compute time, as texts. A text is empty if the share does not set this limit.

    `device`: the UUID of the only device that the share applies to, or an empty text for all devices.
    """

    name: str
    memory: str
    compute: str
    device: str = ""

    @property
    def text(self) -> str:
        """The name that a container requests, which ends with the UUID of the device if the share is for one device."""
        return bound(self.name, self.device) if self.device else self.name

    @property
    def amount(self) -> Amount | None:
        """The limit of memory, or None if the share sets no limit of memory."""
        return units.amount(self.memory) if self.memory else None

    @property
    def limit_millionths(self) -> int | None:
        """The ceiling in millionths of a device's time, or None if the share sets no ceiling."""
        return units.millionths(self.compute) if self.compute else None


def parse(name: str) -> Share:
    """Parse the name of a share. Raise QuantityError, whose message contains the correct form, if the name is invalid.

    `8gib` sets memory, `1536mib-25pct` and `50pct-50pct` set memory and compute time, `all-50pct` sets compute time.
    A share with `:GPU-…` at the end of its name applies to that device only.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match["size"] is None and match["time"] is None):
        raise QuantityError(f"{shown(name)} is not a share: write it as 8gib, 8gib-50pct, 50pct-50pct or all-50pct")
    memory = f"{match['size']}{_UNITS[match['unit']]}" if match["size"] else ""
    share = Share(match["plain"], memory, f"{match['time']}%" if match["time"] else "", match["device"] or "")
    _ = share.amount, share.limit_millionths  # raises QuantityError now instead of when a container starts
    return share


def bound(name: str, device: str) -> str:
    """Return the name of a share of one device. `device`: the UUID of this device."""
    return f"{name}:{device}"
