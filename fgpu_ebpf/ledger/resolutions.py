"""The map `resolved`: the agent's decisions about cgroups, which the gatekeeper reads.

The agent's main thread writes the map. If the map is full, decisions about cgroups that are not managed are removed to
make room. The agent decides again when a program of such a cgroup registers. Errors are OSError of bpf(2).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from itertools import islice

from fgpu_ebpf.linux import bpf

MOST = 16_384  # as in maps.bpf.h
EVICTED = 1_024  # number of decisions that are removed at a time
_U64, _U32 = struct.Struct("Q"), struct.Struct("I")


class Resolution(IntEnum):
    """The agent's decision about a cgroup.

    REFUSED: a limit could not be put in force, so the cgroup's programs get no memory.
    """

    UNMANAGED = 0
    MANAGED = 1
    REFUSED = 2


class Resolutions:
    """The map `resolved`. `maps`: the ledger's open maps by name; `new_epoch`: makes every shim register again."""

    def __init__(self, maps: Mapping[str, int], new_epoch: Callable[[], None]) -> None:
        self._maps, self._new_epoch = maps, new_epoch

    def resolution(self, cgroup: int) -> Resolution | None:
        """Return the decision about a cgroup, or None if no decision exists yet."""
        raw = bpf.lookup(self._maps["resolved"], _U64.pack(cgroup), _U32.size)
        return None if raw is None else Resolution(_U32.unpack(raw)[0])

    def resolved(self, cgroup: int) -> bool | None:
        """Return whether a cgroup is managed; None: no decision yet, or the cgroup is refused."""
        found = self.resolution(cgroup)
        return None if found is None or found is Resolution.REFUSED else found is Resolution.MANAGED

    def resolve(self, cgroup: int, managed: bool) -> None:
        """Record whether a cgroup is managed. Shims register again, unless the cgroup is new and unmanaged."""
        self._put(cgroup, Resolution.MANAGED if managed else Resolution.UNMANAGED)

    def refuse(self, cgroup: int) -> None:
        """Record that programs in this cgroup get no memory."""
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
        """Delete the decision about a cgroup that is not managed.

        The agent decides again when the next program of the cgroup registers.
        """
        bpf.delete(self._maps["resolved"], _U64.pack(cgroup))

    def unresolve(self, cgroups: Iterable[int]) -> None:
        """Delete the decisions about cgroups, and make shims register again. The agent then decides again."""
        known = [cgroup for cgroup in cgroups if bpf.delete(self._maps["resolved"], _U64.pack(cgroup))]
        if known:
            self._new_epoch()

    def not_managed(self) -> Iterable[int]:
        """Yield the cgroups that are unmanaged or refused."""
        for key, value in bpf.items(self._maps["resolved"], _U64.size, _U32.size):
            if _U32.unpack(value)[0] != Resolution.MANAGED:
                yield int(_U64.unpack(key)[0])

    def count(self) -> int:
        """Return the number of decisions."""
        return sum(1 for _ in bpf.items(self._maps["resolved"], _U64.size, _U32.size))
