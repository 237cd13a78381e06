"""Shares of devices' time, what came of them, and what NVML saw of them: the maps `shares`, `turns` and `ran`.

Owns: what their keys and values mean; the agent writes `shares` and `ran`, the gatekeeper `turns`. Never: decides what
stands there. On failure: OSError of bpf(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeAlias

from fgpu_ebpf import bpf, pages
from fgpu_ebpf.events import Events
from fgpu_ebpf.scheduler import Share

Key: TypeAlias = tuple[int, int]  # level and device
_KEY = struct.Struct("QQ")
_SHARE = struct.Struct("4Q")
_TURN = struct.Struct("11Q")
_U32, _U64 = struct.Struct("I"), struct.Struct("Q")
HOST_SHARES = 4
_MOST_WORD = 2**64 - 1
FEW = 24  # shares whose outcomes are looked up faster than a map is walked
assert (_SHARE.size, _TURN.size) == (ctypes.sizeof(pages.Share), ctypes.sizeof(pages.Turn))


@dataclass(frozen=True, slots=True)
class TurnCounts:
    """What came of a level's share of a device; fields as in pages.Turn."""

    owned_ns: int = 0
    waits: int = 0
    wait_ns: int = 0
    overruns: int = 0
    switches: int = 0
    throttled: int = 0
    owner: int = 0
    had_millionths: int = 0
    entitled_millionths: int = 0
    free: int = 0
    since_ns: int = 0


class Timebook:
    """`maps` are the ledger's open maps, by name, and `pins` their folder; `ring` has the kernel wake the threads that
    sleep on `bell`."""

    def __init__(self, maps: dict[str, int], ring: Callable[[], object], pins: Path = Path("/nowhere")) -> None:
        self._maps, self._ring, self._pins = maps, ring, pins
        self._told = 0
        self._shared: tuple[int, Collection[Key]] = (-1, ())

    def bell(self) -> Events | None:
        """Readable once shares have changed or a process has ended, until it is read: it yields the latter, as
        News.ENDED. None: what is pinned is older than this."""
        fd = self._maps.get("bell")
        return None if fd is None else Events(os.dup(fd))

    def ended_ns(self, pid: int) -> int | None:
        """No process of this pid has ended since then, by the kernel's clock. None: nothing that is pinned knows."""
        ends = self._maps.get("ends")
        raw = None if ends is None else bpf.lookup(ends, _U32.pack(pid % pages.ENDS), 8)
        return None if raw is None else int(_U64.unpack(raw)[0])

    def epoch(self) -> int:
        """Changes whenever a share does."""
        return bpf.number(self._maps["host"], HOST_SHARES)

    def shares(self) -> dict[Key, Share]:
        """All of them, by level and device."""
        found = bpf.items(self._maps["shares"], _KEY.size, _SHARE.size)
        return {_KEY.unpack(key): Share(*_SHARE.unpack(value)) for key, value in found}

    def shared(self) -> Collection[Key]:
        """Who has one, for the process that gives them: nothing is read unless it has given others."""
        told = self._told
        if self._shared[0] != told:
            self._shared = told, self.shares().keys()
        return self._shared[1]

    def set_shares(self, wanted: Mapping[int, Mapping[int, Share]]) -> None:
        """What these levels get, by device; a device left out is not gated. The gatekeeper is told."""
        known = {key: share for key, share in self.shares().items() if key[0] in wanted}
        asked = {(level, device): share for level, by in wanted.items() for device, share in by.items()}
        for key in asked:
            self._begin_ran(*key)
        if known == asked:
            return
        try:
            for key in known.keys() - asked.keys():
                self._forget_ran(*key)
                bpf.delete(self._maps["shares"], _KEY.pack(*key))
                bpf.delete(self._maps["turns"], _KEY.pack(*key))
            for key, share in asked.items():
                bpf.update(self._maps["shares"], _KEY.pack(*key), _SHARE.pack(*astuple(share)))
        finally:
            self.tell()

    def tell(self) -> None:
        """The gatekeeper reads the shares again. At a start too: the agent before may have ended before it told."""
        self._told += 1
        bpf.update(self._maps["host"], _U32.pack(HOST_SHARES), _U64.pack(self.epoch() + 1))
        self._ring()

    def forget(self, levels: Collection[int]) -> None:
        """These levels have no share any more, and nothing came of it."""
        self.set_shares({level: {} for level in levels})

    def turns(self) -> dict[Key, TurnCounts]:
        """What came of all shares of which there is word, by level and device."""
        turns, shared = self._maps["turns"], self.shared()
        if len(shared) > FEW:
            found = ((_KEY.unpack(key), value) for key, value in bpf.items(turns, _KEY.size, _TURN.size))
            return {key: _counts(value) for key, value in found if key in shared}
        looked_up = ((key, bpf.lookup(turns, _KEY.pack(*key), _TURN.size)) for key in shared)
        return {key: _counts(value) for key, value in looked_up if value}

    def set_turns(self, level: int, device: int, counts: TurnCounts) -> None:
        """What came of a share, so far. A number that no word can hold is written as the nearest one that it can."""
        words = (min(max(0, number), _MOST_WORD) for number in astuple(counts))
        bpf.update(self._maps["turns"], _KEY.pack(level, device), _TURN.pack(*words))

    def ran_ns(self, level: int, device: int) -> int | None:
        """For how long NVML has seen a level run there; None: it has no share, or the map is not pinned."""
        ran = self._ran()
        raw = None if ran is None else bpf.lookup(ran, _KEY.pack(level, device), _U64.size)
        return None if raw is None else int(_U64.unpack(raw)[0])

    def add_ran(self, level: int, device: int, ns: int) -> None:
        """NVML has seen the level run there for so much longer. Nothing where it has no share any more."""
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
        """The map, which a loader may have pinned after the others: an agent that is newer than what was there."""
        if "ran" not in self._maps:
            with contextlib.suppress(OSError):
                self._maps["ran"] = bpf.pinned(self._pins / "ran")
        return self._maps.get("ran")


def _counts(raw: bytes) -> TurnCounts:
    return TurnCounts(*_TURN.unpack(raw))
