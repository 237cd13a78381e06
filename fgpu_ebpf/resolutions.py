"""What the agent has decided about cgroups, as the gatekeeper reads it: the kernel's map `resolved`.

Owns: what its entries mean. Where the map is full, cgroups that are not managed make room for one that is: programs of
those ask again. Never: decides. On failure: OSError of bpf(2).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from itertools import islice

from fgpu_ebpf import bpf

MOST = 16_384  # as in maps.bpf.h
EVICTED = 1_024  # at a time
_U64, _U32 = struct.Struct("Q"), struct.Struct("I")


class Resolution(IntEnum):
    """REFUSED: a limit is wanted for the cgroup, and it could not be put in force: its programs get no memory."""

    UNMANAGED = 0
    MANAGED = 1
    REFUSED = 2


class Resolutions:
    """`maps` are the ledger's open maps by name; `new_epoch` makes every shim say hello again."""

    def __init__(self, maps: Mapping[str, int], new_epoch: Callable[[], None]) -> None:
        self._maps, self._new_epoch = maps, new_epoch

    def resolution(self, cgroup: int) -> Resolution | None:
        """What was decided about a cgroup; None: nothing yet."""
        raw = bpf.lookup(self._maps["resolved"], _U64.pack(cgroup), _U32.size)
        return None if raw is None else Resolution(_U32.unpack(raw)[0])

    def resolved(self, cgroup: int) -> bool | None:
        """True: managed, False: unmanaged, None: nothing was decided, or it is refused."""
        found = self.resolution(cgroup)
        return None if found is None or found is Resolution.REFUSED else found is Resolution.MANAGED

    def resolve(self, cgroup: int, managed: bool) -> None:
        """Says what a cgroup is. The epoch moves on, so that shims say hello again, unless this answers a new one."""
        self._put(cgroup, Resolution.MANAGED if managed else Resolution.UNMANAGED)

    def refuse(self, cgroup: int) -> None:
        """Programs in this cgroup get no memory."""
        self._put(cgroup, Resolution.REFUSED)

    def _put(self, cgroup: int, resolution: Resolution) -> None:
        before = self.resolution(cgroup)
        if before is resolution:
            return
        try:
            self._write(cgroup, resolution)
        except OSError as error:
            if error.errno != errno.E2BIG or not self._evict():
                raise
            self._write(cgroup, resolution)
        if resolution is Resolution.MANAGED or before is not None:
            self._new_epoch()

    def _write(self, cgroup: int, resolution: Resolution) -> None:
        bpf.update(self._maps["resolved"], _U64.pack(cgroup), _U32.pack(resolution))

    def _evict(self) -> bool:
        found = list(islice(self.not_managed(), EVICTED))
        for cgroup in found:
            self.forget(cgroup)
        return bool(found)

    def forget(self, cgroup: int) -> None:
        """Deletes what was decided about a cgroup that is not managed: its next program asks anew."""
        bpf.delete(self._maps["resolved"], _U64.pack(cgroup))

    def unresolve(self, cgroups: Iterable[int]) -> None:
        """Forgets cgroups: programs that ask from them are looked at anew."""
        known = [cgroup for cgroup in cgroups if bpf.delete(self._maps["resolved"], _U64.pack(cgroup))]
        if known:
            self._new_epoch()

    def not_managed(self) -> Iterable[int]:
        """Cgroups that were found to be unmanaged, or are refused."""
        for key, value in bpf.items(self._maps["resolved"], _U64.size, _U32.size):
            if _U32.unpack(value)[0] != Resolution.MANAGED:
                yield int(_U64.unpack(key)[0])

    def count(self) -> int:
        """How many cgroups something was decided about."""
        return sum(1 for _ in bpf.items(self._maps["resolved"], _U64.size, _U32.size))
