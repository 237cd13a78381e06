"""The map `event_budgets`: how many cgroup events the kernel reports for one workload.

A workload can create, enter and remove any number of cgroups inside its own cgroup. A workload that causes many events
gets a budget of its own in the BPF programs, so that the kernel still reports the events of all other workloads.

This module runs in the agent's main thread. Errors are OSError of bpf(2).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from time import monotonic

from fgpu_ebpf import abi
from fgpu_ebpf.linux import bpf, cgroup_namespace
from fgpu_ebpf.workloads.bound_owner import Owner, Why

BUSY = 100  # a workload with this many events in one second gets a budget
IDLE_SECONDS = 60.0  # a workload without events for this time loses its budget
MOST = abi.EVENT_BUDGETS // 2
_U64 = struct.Struct("Q")
_BYTES = ctypes.sizeof(abi.EventBudget)
_OTHERS = _U64.pack(abi.BUDGET_OTHERS)


@dataclass
class _Budget:
    """The budget of one workload.

    `seen`: when the last event was reported or lost (seconds, monotonic). `lost`: lost events so far.
    """

    key: bytes
    seen: float
    lost: int = 0


class EventBudgets:
    """The budgets of all workloads.

    Args:
        fd: the open map; the caller closes it.
        owner: returns the bound owner of a cgroup, given the cgroup's path.
    """

    def __init__(self, fd: int, owner: Callable[[str], Owner]) -> None:
        """Remove the budgets that an earlier agent has set. Raise OSError on failure."""
        self._fd, self._owner = fd, owner
        self._budgets: dict[str, _Budget] = {}  # by the workload's path
        self._second, self._events = 0, Counter[str]()
        for key, _ in list(bpf.items(fd, _U64.size, _BYTES)):
            bpf.delete(fd, key)
        bpf.update(fd, _OTHERS, bytes(_BYTES))
        if root := os.fsencode(cgroup_namespace.root_path()):
            bpf.update(fd, _U64.pack(abi.BUDGET_ROOT), bytes(abi.EventBudget(second=name_of(root))))
        self._others_lost = 0

    def note(self, paths: Iterable[str]) -> None:
        """Count an event for each of these cgroups, and set a budget for workloads with BUSY events.

        Raise OSError on failure.
        """
        now = monotonic()
        if int(now) != self._second:
            self._second, self._events = int(now), Counter()
        for path in paths:
            around = accumulate(path.split("/"), "{}/{}".format)
            budget = next(filter(None, map(self._budgets.get, around)), None)
            if budget:  # skips the search in cgroups, which would wait for the workload that is changing them
                budget.seen = now
                continue
            owner = self._owner(path)
            if owner.why is Why.ITSELF:  # the cgroup belongs to root: no other user creates cgroups in it
                continue
            self._events[owner.path] += 1
            if self._events[owner.path] >= BUSY:
                self._enter(owner.path, now)

    def _enter(self, path: str, now: float) -> None:
        name = os.fsencode(cgroup_namespace.root_path() + path)
        if len(name) >= abi.PATH:  # the BPF programs read only the beginning of the path
            return
        if len(self._budgets) >= MOST:
            self._forget(min(self._budgets, key=lambda known: self._budgets[known].seen))
        budget = self._budgets[path] = _Budget(_U64.pack(name_of(name)), now)
        bpf.update(self._fd, budget.key, bytes(_BYTES))

    def _forget(self, path: str) -> None:
        bpf.delete(self._fd, self._budgets.pop(path).key)

    def lost(self) -> list[str]:
        """Return the paths of workloads with events lost since the last call. Raise OSError on failure.

        The path "" means all workloads without a budget. Also remove the budgets of workloads that had no events for
        IDLE_SECONDS.
        """
        now, found = monotonic(), list[str]()
        read = {key: abi.EventBudget.from_buffer_copy(raw).lost for key, raw in self._read()}
        for path, budget in list(self._budgets.items()):
            lost = read.get(budget.key, 0)
            if lost > budget.lost:
                budget.lost, budget.seen = lost, now
                found.append(path)
            elif now - budget.seen > IDLE_SECONDS:
                self._forget(path)
        before, self._others_lost = self._others_lost, read.get(_OTHERS, 0)
        return [*found, ""] if self._others_lost > before else found

    def _read(self) -> list[tuple[bytes, bytes]]:
        return list(bpf.items(self._fd, _U64.size, _BYTES))


def name_of(path: bytes) -> int:
    """Return the key of a cgroup's path in the map: its 64-bit FNV-1a hash."""
    name = abi.FNV_BASIS
    for letter in path:
        name = (name ^ letter) * abi.FNV_PRIME % (1 << 64)
    return name
