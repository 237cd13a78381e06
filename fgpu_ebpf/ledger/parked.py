"""Parked processes: processes that the agent parks or has parked, and their bytes that no device holds.

The map `parked` has an entry of each such process, from before the first call of the driver until the process runs
again or has exited. An agent that starts finds in this map the processes that have to be woken. Only BPF programs
change the map. This module runs in the agent's main thread. Errors are OSError of bpf(2).
"""

from __future__ import annotations

import ctypes
import errno
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.linux import bpf

_KEY = struct.Struct("IIQ")
_VALUE = ctypes.sizeof(abi.Parked)
_TRIES, _PAUSE_SECONDS = 20, 0.001  # a step that a thread of the process has disturbed is repeated

Life = tuple[int, int]  # pid and generation of a process in the ledger


class Parked(NamedTuple):
    """An entry of the map. `bytes`: by ledger index. `level`: the cgroup that stays charged; 0: no level."""

    since_ns: int
    level: int
    bytes: tuple[int, ...]


class ParkedMap:
    """The map `parked`.

    Args:
        maps: the ledger's open maps, by name.
        run: runs the BPF program `adjust` with its arguments.
        moving: a lock that is held while a process is moved to other levels.
    """

    def __init__(
        self, maps: Mapping[str, int], run: Callable[..., int], moving: AbstractContextManager[object]
    ) -> None:
        self._maps = maps
        self._adjust = run
        self._moving = moving
        self.unmoved: set[int] = set()
        """Processes that are to be moved to other levels when they run again, by pid."""

    def entries(self) -> dict[Life, Parked]:
        """Return all entries by process."""
        found = {}
        for raw_key, raw in bpf.items(self._maps["parked"], _KEY.size, _VALUE):
            tgid, _, generation = _KEY.unpack(raw_key)
            entry = abi.Parked.from_buffer_copy(raw)
            found[tgid, generation] = Parked(entry.since_ns, entry.level.cgroup, tuple(entry.bytes))
        return found

    def begin(self, life: Life) -> int:
        """Record that the agent is about to park a process. Return 0 or an errno. E2BIG: the map is full."""
        return self._run(abi.Adjust.BEGIN_PARK, *life)

    def park(self, life: Life) -> int:
        """Record that no device holds memory of the process. Return 0 or an errno. ESRCH: the process has exited."""
        return self._each_device(abi.Adjust.PARK, life)

    def wake(self, life: Life, force: bool = False) -> int:
        """Charge the parked bytes of a process again. The caller parks the bytes again if only some devices have room.

        Args:
            life: the process.
            force: charge the bytes whatever the limits, because the driver has restored the memory.

        Returns:
            0 or an errno. ENOSPC: a level around the process's own level has no room. ESRCH: the process has exited.
        """
        return self._each_device(abi.Adjust.WAKE, life, int(force))

    def decide_on_room(self, cgroup: int, device: int, seconds: float | None) -> None:
        """Write the decision about a level's requests that lack room on a full device to the level's page.

        Args:
            cgroup: the level, which may have been removed.
            device: the full device.
            seconds: for how long the requests wait before the repetition, at most ROOM_NS; None: the requests fail now.
        """
        until_ns = 0 if seconds is None else time.monotonic_ns() + round(seconds * 1e9)
        self._adjust(abi.Adjust.ROOM, cgroup, device, until_ns)

    def end(self, life: Life) -> int:
        """Delete the entry of a process that runs again. Return 0 or an errno. EBUSY: the process has parked bytes."""
        return self._run(abi.Adjust.END_PARK, *life)

    def _each_device(self, verb: abi.Adjust, life: Life, *more: int) -> int:
        return next(filter(None, (self._run(verb, *life, device, *more) for device in range(abi.DEVICES))), 0)

    def _run(self, *arguments: int) -> int:
        for _ in range(_TRIES):
            with self._moving:
                done = -self._adjust(*arguments)
            if done != errno.EAGAIN:
                break
            time.sleep(_PAUSE_SECONDS)
        return done
