"""The BPF maps of compute time: `shares`, `turns`, and `ran` (the time that each level has run, as measured by NVML).

The agent writes `shares` and `ran`, and creates and deletes the entries of `turns`. The gatekeeper writes the contents
of these entries. Agent and gatekeeper read all maps. This module runs in the agent's main thread and reconcile thread,
and in the gatekeeper's main thread and time slicer thread. Errors are OSError of bpf(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeAlias

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.ring_buffer import Events
from fgpu_ebpf.linux import bpf
from fgpu_ebpf.scheduling.counters import Counts
from fgpu_ebpf.scheduling.fair_queue import Share

Key: TypeAlias = tuple[int, int]  # level (cgroup id) and device (ledger index)
_KEY = struct.Struct("QQ")
_SHARE = struct.Struct("4Q")
_TURN = struct.Struct("11Q")
_U32, _U64 = struct.Struct("I"), struct.Struct("Q")
HOST_SHARES = 4
_CONCURRENT_SHIFT = 48  # the bits of host[HOST_SHARES] from this bit on name the concurrent devices
_ISOLATED = 1 << 32  # a flag in a share's rank
_MOST_WORD = 2**64 - 1
FEW = 24  # for up to this many shares, single lookups are faster than reading the whole map
assert (_SHARE.size, _TURN.size) == (ctypes.sizeof(abi.Share), ctypes.sizeof(abi.Turn))


@dataclass(slots=True)
class TurnCounts(Counts):
    """The counters of a level's share of a device; fields as in abi.Turn."""

    owner: int = 0
    had_millionths: int = 0
    entitled_millionths: int = 0
    free: int = 0
    since_ns: int = 0


class ComputeMaps:
    """The maps `shares`, `turns` and `ran`.

    Args:
        maps: the ledger's open maps, by name.
        wake: makes the kernel wake the gatekeeper, which reads the ring buffer `bell`.
        pins: the folder of the pinned maps.
    """

    def __init__(self, maps: dict[str, int], wake: Callable[[], object], pins: Path = Path("/nowhere")) -> None:
        self._maps, self._wake, self._pins = maps, wake, pins
        self._changes = 0  # number of changes of the shares by this object
        self._concurrent = 0  # a bit for each concurrent device
        self._shared: tuple[int, Collection[Key]] = (-1, ())
        self._ended: dict[Key, TurnCounts] = {}  # the last counters of shares that were removed

    def bell(self) -> Events | None:
        """Return a reader of the ring buffer `bell`, or None if the pinned maps are of a version without this map.

        The reader is readable after shares have changed, a process that had a context has exited, or a process has
        reported that the process may not connect to the gatekeeper. The reader yields exits as News.ENDED and these
        reports as News.KNOCK.
        """
        fd = self._maps.get("bell")
        return None if fd is None else Events(os.dup(fd))

    def ended_ns(self, pid: int) -> int | None:
        """Return a time after which no process with this pid has exited (CLOCK_MONOTONIC, ns), or None."""
        ends = self._maps.get("ends")
        raw = None if ends is None else bpf.lookup(ends, _U32.pack(pid % abi.ENDS), 8)
        return None if raw is None else int(_U64.unpack(raw)[0])

    def epoch(self) -> int:
        """Return a number that changes with every change of a share, or of the set of concurrent devices."""
        return bpf.number(self._maps["host"], HOST_SHARES)

    def concurrent(self) -> frozenset[int]:
        """Return the concurrent devices, whose tenants run at the same time."""
        epoch = self.epoch()
        return frozenset(device for device in range(abi.DEVICES) if epoch >> _CONCURRENT_SHIFT & 1 << device)

    def set_concurrent(self, devices: Iterable[int]) -> None:
        """Set the concurrent devices. tell() notifies the gatekeeper."""
        self._concurrent = sum(1 << device for device in set(devices))

    def shares(self) -> dict[Key, Share]:
        """Return all shares, by level and device."""
        found = bpf.items(self._maps["shares"], _KEY.size, _SHARE.size)
        return {_KEY.unpack(key): _share(value) for key, value in found}

    def share(self, level: int, device: int) -> Share | None:
        """Return a level's share of a device; None: the level has no share of the device."""
        raw = bpf.lookup(self._maps["shares"], _KEY.pack(level, device), _SHARE.size)
        return None if raw is None else _share(raw)

    def turn(self, level: int, device: int) -> TurnCounts | None:
        """Return the counters of a level's share of a device; None: the map has no counters of this share."""
        return _counts(bpf.lookup(self._maps["turns"], _KEY.pack(level, device), _TURN.size))

    def shared(self) -> Collection[Key]:
        """Return the keys of all shares, from a cache. Only the agent may call this method.

        The agent is the only writer of the map, so the cache is renewed only after changes by this object.
        """
        changes = self._changes
        if self._shared[0] != changes:
            self._shared = changes, self.shares().keys()
        return self._shared[1]

    def set_shares(self, wanted: Mapping[int, Mapping[int, Share]]) -> None:
        """Set the shares of these levels, by device, and notify the gatekeeper of a change.

        A level is not gated on a device that is left out.
        """
        known = {key: share for key, share in self.shares().items() if key[0] in wanted}
        asked = {(level, device): share for level, by in wanted.items() for device, share in by.items()}
        for key in asked:
            self._begin_ran(*key)
            bpf.insert(self._maps["turns"], _KEY.pack(*key), bytes(_TURN.size))
        if known == asked:
            return
        try:
            for key in known.keys() - asked.keys():
                if counts := self.turn(*key):
                    self._ended[key] = counts
                self._forget_ran(*key)
                bpf.delete(self._maps["shares"], _KEY.pack(*key))
                bpf.delete(self._maps["turns"], _KEY.pack(*key))
            for key, share in asked.items():
                bpf.update(self._maps["shares"], _KEY.pack(*key), _packed(share))
        finally:
            self.tell()

    def tell(self) -> None:
        """Make the gatekeeper read the shares.

        The agent also calls tell() at its start, because the last agent may have been killed between a change and this
        call.
        """
        self._changes += 1
        counter = (self.epoch() + 1) % (1 << _CONCURRENT_SHIFT)
        bpf.update(
            self._maps["host"], _U32.pack(HOST_SHARES), _U64.pack(self._concurrent << _CONCURRENT_SHIFT | counter)
        )
        self._wake()

    def forget(self, levels: Collection[int]) -> None:
        """Remove all shares of these levels, with their counters."""
        self.set_shares({level: {} for level in levels})

    def turns(self) -> dict[Key, TurnCounts]:
        """Return the counters of all shares that have counters, by level and device."""
        turns, shared = self._maps["turns"], self.shared()
        found: Iterable[tuple[Key, TurnCounts | None]]
        if len(shared) > FEW:
            found = ((_KEY.unpack(key), _counts(raw)) for key, raw in bpf.items(turns, _KEY.size, _TURN.size))
        else:
            found = ((key, self.turn(*key)) for key in shared)
        return {key: counts for key, counts in found if counts and key in shared}

    def take_ended(self) -> dict[Key, TurnCounts]:
        """Return the last counters of the shares that this object has removed since the last call."""
        ended, self._ended = self._ended, {}
        return ended

    def set_turns(self, level: int, device: int, counts: TurnCounts) -> None:
        """Write the counters of a share, unless the share was removed. Numbers are clamped to unsigned 64 bits."""
        words = (min(max(0, number), _MOST_WORD) for number in astuple(counts))
        bpf.replace(self._maps["turns"], _KEY.pack(level, device), _TURN.pack(*words))

    def ran_ns(self, level: int, device: int) -> int | None:
        """Return how long a level has run on a device according to NVML, in nanoseconds.

        Return None if the level has no share of the device, or the map `ran` is not pinned.
        """
        ran = self._ran()
        raw = None if ran is None else bpf.lookup(ran, _KEY.pack(level, device), _U64.size)
        return None if raw is None else int(_U64.unpack(raw)[0])

    def add_ran(self, level: int, device: int, ns: int) -> None:
        """Add time that a level has run according to NVML. Do nothing if the level no longer has a share."""
        ran, before_ns = self._ran(), self.ran_ns(level, device)
        if ran is not None and before_ns is not None:
            bpf.replace(ran, _KEY.pack(level, device), _U64.pack((before_ns + ns) & _MOST_WORD))

    def _begin_ran(self, level: int, device: int) -> None:
        ran = self._ran()
        if ran is not None:
            bpf.insert(ran, _KEY.pack(level, device), _U64.pack(0))

    def _forget_ran(self, level: int, device: int) -> None:
        ran = self._ran()
        if ran is not None:
            bpf.delete(ran, _KEY.pack(level, device))

    def _ran(self) -> int | None:
        """Return the map `ran`, or None if the map is not pinned.

        If a version without this map has pinned the other maps, `ran` is pinned later than the other maps.
        """
        if "ran" not in self._maps:
            with contextlib.suppress(OSError):
                self._maps["ran"] = bpf.pinned(self._pins / "ran")
        return self._maps.get("ran")


def _share(raw: bytes) -> Share:
    limit_millionths, weight, rank, quantum_ns = _SHARE.unpack(raw)
    return Share(limit_millionths, weight, rank % _ISOLATED, quantum_ns, rank >= _ISOLATED)


def _packed(share: Share) -> bytes:
    rank = share.rank + (_ISOLATED if share.isolated else 0)
    return _SHARE.pack(share.limit_millionths, share.weight, rank, share.quantum_ns)


def _counts(raw: bytes | None) -> TurnCounts | None:
    """Return the counters in an entry of `turns`; None: the gatekeeper has written no counters so far."""
    return TurnCounts(*_TURN.unpack(raw)) if raw and any(raw) else None
