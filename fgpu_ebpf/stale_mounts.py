"""Containers whose mount of the gatekeeper's folder shows a removed one: their programs get no memory.

Runs in the agent's main loop, at every rescan. Owns: which of them have been told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping

from fgpu_ebpf.checks import Check
from fgpu_ebpf.history import History
from fgpu_ebpf.shim_mounts import Mount, mount_of
from fgpu_ebpf.tenants import Tenant

NAME = "mounts"
_FIX = "start the container anew: its mount shows the folder that was there before, for the container's life"
_MOST_NAMED = 5


class StaleMounts:
    """`pids` returns the processes of a cgroup; `lacks` is the agent's list of what is missing, and is written here."""

    def __init__(self, pids: Callable[[str], list[int]], history: History, lacks: MutableMapping[str, Check]) -> None:
        self._pids, self._history, self._lacks = pids, history, lacks
        self._told: set[str] = set()

    def look(self, tenants: Iterable[Tenant]) -> None:
        """One process of each tenant says what its container shows."""
        stale = {t.name for t in tenants for pid in self._pids(t.path)[:1] if mount_of(pid) is Mount.REMOVED}
        for name in sorted(stale - self._told):
            self._history.add("stale mount", tenant=name, text="/run/fgpu/shim was removed under the container")
        self._told = stale
        self._lacks.pop(NAME, None)
        if stale:
            named = ", ".join(sorted(stale)[:_MOST_NAMED])
            found = f"/run/fgpu/shim was removed under {named}: programs that start there get no memory"
            self._lacks[NAME] = Check("mounts", False, found, _FIX)
