"""The map `owners`: the number of entries of each bound owner in the maps that all tenants share, and its maximum.

This module runs in the agent's main thread, which assigns the slots. BPF programs count the entries. A slot is assigned
to another owner only after its counts have become zero. Errors are OSError; E2BIG: all slots are in use.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import heapq
import os
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.linux import bpf

_U32 = struct.Struct("I")
_BYTES = ctypes.sizeof(abi.Owner)


class Share(NamedTuple):
    """The entries of one owner in each map, and their maximum, in the order of abi.Shared."""

    cgroup: int
    entries: tuple[int, ...]
    most: tuple[int, ...]


class OwnerTable:
    """The slots of all owners. `maps`: the ledger's open maps by name; `run`: runs the program `adjust`."""

    def __init__(self, maps: Mapping[str, int], run: Callable[..., int]) -> None:
        self._maps, self._run = maps, run
        self._slots: dict[int, int] | None = None  # by the owner's cgroup; None: not read yet
        self._free: list[int] = []

    def attach(self, level: int, owner: int, most: tuple[int, ...], in_use: Collection[int]) -> int:
        """Make this owner the bound owner of a level, and return the owner's slot. Raise OSError on failure.

        Args:
            level: the cgroup of the level.
            owner: the cgroup of the owner.
            most: the maximum of entries in each map, in the order of abi.Shared.
            in_use: owners that have levels, whose slots are kept.
        """
        slot = self._slot(owner, in_use)
        done = self._run(abi.Adjust.OWN, level, slot, owner, *most)
        if done < 0:
            raise OSError(-done, f"cannot count a cgroup for its workload (BPF program adjust): {os.strerror(-done)}")
        return slot

    def share(self, owner: int) -> Share | None:
        """Return the entries of an owner, or None if the owner has no slot."""
        slot = self._look().get(owner)
        return None if slot is None else self._share(slot)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The maximum number of entries of each map of abi.Shared. A map pinned by an older version may be smaller."""
        return {(name := shared.name.lower()): bpf.form(self._maps[name]).max_entries for shared in abi.Shared}

    def claimed(self) -> tuple[int, ...]:
        """Return how many entries of each map all owners together have claimed."""
        return self._share(abi.OWNERS - 1).entries

    def trim(self) -> None:
        """Release unneeded claims of owners if more than half of a map is claimed.

        The caller has to call this method regularly. Raise OSError on failure.
        """
        claimed = self.claimed()
        if any(2 * n > most for n, most in zip(claimed, self.sizes.values(), strict=False)):
            self._trim(self._look().values())

    def _trim(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._run(abi.Adjust.TRIM, slot)

    def _slot(self, owner: int, in_use: Collection[int]) -> int:
        slots = self._look()
        if owner not in slots:
            if not self._free:
                self._reclaim(in_use)
            slots[owner] = heapq.heappop(self._free)
        return slots[owner]

    def _reclaim(self, in_use: Collection[int]) -> None:
        """Free the slots of owners that have no level and no entries."""
        slots = self._look()
        self._trim(slots.values())
        for owner, slot in list(slots.items()):
            if owner not in in_use and not any(self._share(slot).entries):
                heapq.heappush(self._free, slots.pop(owner))
        if not self._free:
            raise OSError(errno.E2BIG, "the maximum number of workloads with bounds is reached")

    def _share(self, slot: int) -> Share:
        raw = bpf.lookup(self._maps["owners"], _U32.pack(slot), _BYTES) or bytes(_BYTES)
        found = abi.Owner.from_buffer_copy(raw)
        return Share(found.cgroup, tuple(found.entries), tuple(found.most))

    def _look(self) -> dict[int, int]:
        """Return the slots, including the slots that an earlier agent has assigned."""
        if self._slots is None:
            read = bpf.items(self._maps["owners"], _U32.size, _BYTES)
            found = {_U32.unpack(key)[0]: abi.Owner.from_buffer_copy(raw).cgroup for key, raw in read}
            self._slots = {cgroup: slot for slot, cgroup in found.items() if cgroup}
            self._free = sorted(slot for slot, cgroup in found.items() if 0 < slot < abi.OWNERS - 1 and not cgroup)
        return self._slots
