"""Scans of cgroups in short steps, which find changes that no kernel event has reported.

A scan runs in the agent's main loop, in slices (`sliced_looks`). A step handles a bounded number of cgroups, however
many cgroups a workload has made. A step raises the errors of the parts that it calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from fgpu_ebpf.agent.kernel_events import KernelEvents
from fgpu_ebpf.agent.reporters import StaleMountReports
from fgpu_ebpf.agent.sliced_looks import ALL
from fgpu_ebpf.containers.injection import Lists
from fgpu_ebpf.driver.discovery import Discovery
from fgpu_ebpf.linux import malloc, procfs
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.workloads.engine_labels import Engines

CHUNK = 8  # cgroups that are considered in one step
READ = 256  # names of a folder that are read in one step
T = TypeVar("T")


class HostLook:
    """The scans of the host's cgroups."""

    def __init__(
        self, manager: Manager, kernel_events: KernelEvents, engines: Engines, discovery: Discovery,
        stale_mounts: StaleMountReports, lists: Lists,
    ) -> None:  # fmt: skip
        self._manager, self._enforcer, self._workloads = manager, manager.enforcer, manager.workloads
        self._kernel_events, self._engines, self._discovery = kernel_events, engines, discovery
        self._stale_mounts, self._lists = stale_mounts, lists

    def steps(self, path: str) -> Iterator[None]:
        """Return the steps of a scan of the cgroup at `path` and all cgroups below.

        If `path` is ALL, all cgroups of the host are scanned.
        """
        return self._everything() if path == ALL else self._inside(path)

    def _everything(self) -> Iterator[None]:
        answered, live = self._enforcer.answered.known(), {self._workloads.cgroup("")}
        for paths in chunks(self._workloads.own(), CHUNK):
            self._manager.remove_empty(paths)
            yield
        for found in self._cgroups(ALL):
            self._manager.consider(path for _, path in found)
            live |= {cgroup for cgroup, _ in found}
            yield
        yield from self._gone(ALL)
        self._engines.rescanned()
        yield from self._follow(ALL)
        self._discovery.look_around()
        yield from self.tenants()
        self._enforcer.answered.forget_gone(answered, live)
        yield
        self._lists.sweep()
        malloc.give_back()

    def _inside(self, path: str) -> Iterator[None]:
        self._manager.remove_empty([path])
        self._manager.consider([path])
        for found in self._cgroups(path):
            self._manager.consider(inner for _, inner in found)
            yield
        yield from self._gone(path)
        yield from self._follow(path)

    def _cgroups(self, top: str) -> Iterator[list[tuple[int, str]]]:
        """Yield the id and the path of every cgroup below `top`, in chunks.

        The cgroups are sorted by depth. At each depth, older cgroups precede newer cgroups.

        A chunk is empty if its step has only read a part of a folder.
        """
        layer = [(0, top)]
        while layer:
            inner: list[tuple[int, str]] = []
            for _, path in layer:
                for names in chunks(self._workloads.inside(path), READ):
                    inner += names
                    yield []
            layer = sorted(inner)
            yield from chunks(layer, CHUNK)

    def _gone(self, top: str) -> Iterator[None]:
        """Decide again about the tenants in `top` whose cgroups no longer exist."""
        for tenants in chunks(list(self._enforcer), CHUNK):
            paths = [t.path for t in tenants if is_inside(t.path, top) and self._workloads.cgroup(t.path) != t.cgroup]
            self._manager.consider(paths)
            yield

    def _follow(self, top: str) -> Iterator[None]:
        """Move the charges of processes to the present cgroups of these processes."""
        found: set[str] = set()
        for pids in chunks(self._kernel_events.charged(), CHUNK):
            found |= {path for pid in pids if (path := procfs.cgroup_path(pid)) and is_inside(path, top)}
            yield
        for paths in chunks(found, CHUNK):
            self._kernel_events.follow(paths)
            yield

    def tenants(self) -> Iterator[None]:
        """Check each tenant for stale mounts, and scan the root of its first process.

        The first process may have started while no agent ran, so that no agent received the exec event.
        """
        for tenant in list(self._enforcer):
            for pid in self._workloads.pids(tenant.path)[:1]:
                self._discovery.look_into(pid)
            yield
        yield from self._stale_mounts.look(list(self._enforcer))


def is_inside(path: str, top: str) -> bool:
    """Return True if the cgroup is at `top` or below."""
    return path == top or path.startswith(f"{top}/")


def chunks(of: Iterable[T], most: int) -> Iterator[list[T]]:
    """Yield lists of at most `most` elements each."""
    left = iter(of)
    while chunk := list(islice(left, most)):
        yield chunk
