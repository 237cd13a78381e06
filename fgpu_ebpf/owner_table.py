"""The kernel's map `owners`: what each owner of bounds has of the maps that all tenants share, and may have.

Owns: which owner has which slot. A slot is another owner's only when nothing counts there any more. Never: decides what
an owner may have, or changes what it has: BPF programs count. On failure: OSError, E2BIG: every slot is taken.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from fgpu_ebpf import bpf, pages

# Maps of which owners claim parts, and their sizes: as in maps.bpf.h, in the order of fgpu.h.
COUNTED = {"allocations": 262_144, "threads": 65_536, "processes": 16_384}
_U32 = struct.Struct("I")
_BYTES = ctypes.sizeof(pages.Owner)


@dataclass(frozen=True, slots=True)
class Share:
    """What one owner has: entries of each map, by the number of the map in fgpu.h."""

    cgroup: int
    entries: tuple[int, ...]


class OwnerTable:
    """`maps` are the ledger's open maps by name; `run` runs the program `adjust`."""

    def __init__(self, maps: Mapping[str, int], run: Callable[..., int]) -> None:
        self._maps, self._run = maps, run
        self._slots: dict[int, int] | None = None  # by the owner's cgroup; None: not looked at yet
        self._free: list[int] = []

    def attach(self, level: int, owner: int, most: tuple[int, ...], in_use: Collection[int]) -> int:
        """The level's bounds are this owner's from now on; returns the owner's slot. Raises OSError.

        `in_use`: owners that have levels: they keep their slots.
        """
        slot = self._slot(owner, in_use)
        done = self._run(pages.Adjust.OWN, level, slot, owner, *most)
        if done < 0:
            raise OSError(-done, "adjust(own)")
        return slot

    def share(self, owner: int) -> Share | None:
        """What an owner has; None: it is none."""
        slot = self._look().get(owner)
        return None if slot is None else self._share(slot)

    def claimed(self) -> tuple[int, ...]:
        """Entries of each map that all owners together have claimed."""
        return self._share(pages.OWNERS - 1).entries

    def trim(self) -> None:
        """Takes back what owners have claimed and do not need; to be called now and then. Raises OSError."""
        claimed = self.claimed()
        if any(2 * n > most for n, most in zip(claimed, COUNTED.values(), strict=False)):
            self._trim(self._look().values())

    def _trim(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._run(pages.Adjust.TRIM, slot)

    def _slot(self, owner: int, in_use: Collection[int]) -> int:
        slots = self._look()
        if owner not in slots:
            if not self._free:
                self._reclaim(in_use)
            slots[owner] = heapq.heappop(self._free)
        return slots[owner]

    def _reclaim(self, in_use: Collection[int]) -> None:
        """Frees the slots of owners that have no level and no entries."""
        slots = self._look()
        self._trim(slots.values())
        for owner, slot in list(slots.items()):
            if owner not in in_use and not any(self._share(slot).entries):
                heapq.heappush(self._free, slots.pop(owner))
        if not self._free:
            raise OSError(errno.E2BIG, "as many workloads have bounds as may")

    def _share(self, slot: int) -> Share:
        raw = bpf.lookup(self._maps["owners"], _U32.pack(slot), _BYTES) or bytes(_BYTES)
        found = pages.Owner.from_buffer_copy(raw)
        return Share(found.cgroup, tuple(found.entries))

    def _look(self) -> dict[int, int]:
        """Those that an agent before this one has entered."""
        if self._slots is None:
            read = bpf.items(self._maps["owners"], _U32.size, _BYTES)
            found = {_U32.unpack(key)[0]: pages.Owner.from_buffer_copy(raw).cgroup for key, raw in read}
            self._slots = {cgroup: slot for slot, cgroup in found.items() if cgroup}
            self._free = sorted(slot for slot, cgroup in found.items() if 0 < slot < pages.OWNERS - 1 and not cgroup)
        return self._slots
