"""Traces of the hostile soak: on the host after `fgpu detach`, and in agent, gatekeeper and kernel before that.

The module imports nothing of fgpu.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.commands import ask
from tests.support.host import cgroup_root
from tests.support.kernel import entries
from tests.support.sim_driver import driver_books

# Maps with an entry for each cgroup, process, thread or allocation of a tenant.
MAPS = ("pages", "resolved", "limits", "shares", "turns", "ran", "processes", "threads", "allocations", "orphans")
FOLDERS = ("/etc", "/run/fgpu", "/usr/lib/fgpu", "/var/lib/fgpu", "/dev/shm")
PINS = "/sys/fs/bpf"
# Files that `fgpu detach` keeps: the size of a context, and the store of `fgpu usage`.
STAYING = {"/var/lib/fgpu/contexts.json", "/var/lib/fgpu/usage.db"}
MORE_DESCRIPTORS = 5  # how many more descriptors a busy agent or gatekeeper may have
FORGOTTEN_SECONDS, GONE_SECONDS, PAUSE_SECONDS = 30.0, 10.0, 0.1


def until_none(look: Callable[[], Collection[str]], seconds: float) -> list[str]:
    """Call a function until it returns nothing, for at most `seconds`. Return its last result."""
    deadline = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(PAUSE_SECONDS)
    return sorted(found)


def _inside(*folders: str | Path) -> Iterator[str]:
    for folder in folders:
        for around, inside, names in os.walk(folder):
            yield from (os.path.join(around, name) for name in (*inside, *names))


def _processes() -> Iterator[str]:
    """Yield the running processes of this mount namespace."""
    here = os.readlink("/proc/self/ns/mnt")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/ns/mnt") == here:
                yield f"{pid} {Path('/proc', pid, 'comm').read_text().strip()}"
        except OSError:  # it has ended
            continue


@dataclass(frozen=True, slots=True)
class Host:
    """The cgroups, files, pinned objects and processes of a host, or of a world (`tests/world.py`)."""

    cgroups: frozenset[str]
    files: frozenset[str]
    pins: frozenset[str]
    processes: frozenset[str]

    @classmethod
    def now(cls) -> Host:
        """Return the current state."""
        root = cgroup_root()
        cgroups = (around for around, _, _ in os.walk(root))
        return cls(*map(frozenset, (cgroups, _inside(*FOLDERS), _inside(PINS), _processes())))

    def more(self, other: Host) -> set[str]:
        """Return what `other` has and this state has not."""
        return {
            f"{kind}: {one}"
            for kind in ("cgroups", "files", "pins", "processes")
            for one in getattr(other, kind) - getattr(self, kind) - STAYING
        }

    def left(self) -> list[str]:
        """Return what exists beyond this state, GONE_SECONDS from now at the latest."""
        return until_none(lambda: self.more(Host.now()), GONE_SECONDS)


@dataclass(frozen=True, slots=True)
class Kept:
    """The sizes of maps, and the descriptors of agent and gatekeeper, while there is no tenant."""

    pids: Mapping[str, int]
    entries: Mapping[str, int]
    descriptors: Mapping[str, int]

    @classmethod
    def now(cls, pids: Mapping[str, int]) -> Kept:
        """Return the current sizes. `pids`: agent and gatekeeper, by name."""
        descriptors = {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()}
        return cls(pids, {name: entries(name) for name in MAPS}, descriptors)

    def more(self) -> set[str]:
        """Return what is left of tenants that have ended."""
        now = Kept.now(self.pids)
        found = {f"tenant {tenant['path']}" for tenant in ask(verb="snapshot")["tenants"]}
        found |= {f"process {entry['pid']} in the driver's figures" for entry in driver_books()}
        for name, most in self.entries.items():
            if now.entries[name] > most:
                found.add(f"{now.entries[name]} entries of {name}, not {most}")
        for name, before in self.descriptors.items():
            if now.descriptors[name] > before + MORE_DESCRIPTORS:
                found.add(f"{now.descriptors[name]} descriptors of the {name}, not {before}")
        return found

    def left(self) -> list[str]:
        """Return what is left of tenants that have ended, FORGOTTEN_SECONDS from now at the latest."""
        return until_none(self.more, FORGOTTEN_SECONDS)
