"""The limits of a level, and the first contents of its usage page.

This module runs in the agent, which decides the limits. The ledger puts the limits in force.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from fgpu_ebpf import abi

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class LevelLimits:
    """The limits of a level in bytes by ledger index. The level may not use a device whose index is missing.

    `flags`: abi.LimitFlag. `owner`: the slot of the level's bound owner. `uncommitted`: devices on which the limit does
    not count yet. `orphaned`: orphaned bytes by device, for a new page. `outside`: the part of the limits that views do
    not show, in whole MiB.
    """

    cgroup: int
    bytes: Mapping[int, int]
    flags: int = 0
    owner: int = 0
    uncommitted: Set[int] = frozenset()
    orphaned: Mapping[int, int] = field(default_factory=dict)
    outside: Mapping[int, int] = field(default_factory=dict)

    def flags_of(self, device: int) -> int:
        """Return the flags of the limit on one device."""
        said = self.flags | (abi.uncommitted(device) if device in self.uncommitted else 0)
        return said | self.outside.get(device, 0) // _MIB << abi.OUTSIDE_SHIFT


def outside_of(flags: int) -> int:
    """Return the bytes of a limit that views do not show, from the flags of the limit."""
    return (flags >> abi.OUTSIDE_SHIFT) * _MIB


def whole_mib(bytes_: int) -> int:
    """Return a size rounded up to MiB, the unit in which the part that views do not show is stored."""
    return -(-bytes_ // _MIB) * _MIB


def new_page(level: LevelLimits) -> abi.UsagePage:
    """Return a usage page with the limits of a level. The charges are the level's orphaned bytes."""
    flags = functools.reduce(operator.or_, map(level.flags_of, level.bytes), level.flags) % (1 << abi.OUTSIDE_SHIFT)
    page = abi.UsagePage(version=abi.LAYOUT, cgroup=level.cgroup, flags=flags, owner=level.owner)
    for device, limit in level.bytes.items():  # a limit of 0 denies the device
        page.devices[device].limit, page.outside[device] = limit, level.outside.get(device, 0)
    for device, bytes_ in level.orphaned.items():
        page.devices[device].used = page.devices[device].peak = page.orphaned[device] = bytes_
        page.orphaned_ns[device] = time.monotonic_ns()
    return page
