"""A cache of ledger lookups for one iteration of the gatekeeper's loop, so that many hellos share each lookup.

This module runs in the gatekeeper's main thread. The cache never outlives the iteration, because a decision that was
made before a process connected must apply to this process's hello. The cache owns the descriptors of the usage pages
that the cache opens. Errors are OSError of bpf(2) or of /proc.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from fgpu_ebpf import abi
from fgpu_ebpf.abi import ControlFlag
from fgpu_ebpf.gatekeeper.sessions import PageHeader
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.resolutions import Resolution
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.procmaps import File
from fgpu_ebpf.workloads.bound_owner import owner_of

MOST_PAGES = 256


class ManagedState(NamedTuple):
    """State of a process's cgroups in the ledger. `managed`: None while the agent has not decided.

    `refused`: a limit could not be put in force. `owner`: the cgroup whose bounds apply to the process; 0: unknown.
    """

    managed: bool | None
    tenant: int
    levels: tuple[int, ...] = ()
    refused: bool = False
    owner: int = 0


class Grant(NamedTuple):
    """The pages for a managed process: the header of its control page; descriptors of usage pages, innermost first."""

    header: PageHeader
    usage: tuple[int, ...]


class Decisions(Protocol):
    """The part of the ledger's interface that reads the agent's decisions about cgroups."""

    def resolved(self, cgroup: int) -> Resolution | None:
        """Return the agent's decision about a cgroup; None: no decision yet."""

    def page_missing(self, cgroup: int) -> bool:
        """Return True if the level has no page."""


def managed_state(ledger: Decisions | None, ids: Sequence[int]) -> ManagedState:
    """Combine the decisions about a cgroup and about all enclosing cgroups.

    The first rule that applies determines the result:

        any of the cgroups is refused                             refused
        a cgroup has a page, but no decision "managed"            undecided
        any of the cgroups is managed                             managed, with all managed cgroups as levels
        the cgroup itself is unmanaged, by decision               unmanaged
        no rule above applies                                     undecided, even inside an unmanaged cgroup: a new
                                                                  cgroup may belong to a tenant

    Args:
        ledger: the decisions; None: the ledger is not open yet.
        ids: the ids of the cgroup and of all enclosing cgroups, innermost first.

    Raises:
        OSError: the kernel's maps cannot be read.
    """
    said = {cgroup: ledger.resolved(cgroup) for cgroup in ids} if ledger else {}
    if Resolution.REFUSED in said.values():
        return ManagedState(False, ids[0], refused=True)
    in_force = (c for c in said if said[c] or (ledger and not ledger.page_missing(c)))
    levels = tuple(in_force)[-abi.LEVELS :]  # of too many levels, the outermost remain, as in the kernel
    if not all(said[cgroup] for cgroup in levels):
        return ManagedState(None, ids[0])  # no process has used this level yet: the agent decides first
    if levels:
        return ManagedState(True, levels[0], levels)
    leaf = ids[0] if ids else 0
    return ManagedState(None if said.get(leaf) is None else False, leaf)


class Lineages:
    """A cache of the ancestors and the bound owner of each cgroup, until forget().

    The ancestors of a cgroup and their ids never change. The owner may change when a cgroup around the cgroup gets a
    limit.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[int, tuple[int, ...]] = {}
        self._owners: dict[int, int] = {}

    def of(self, pid: int, cgroup: int) -> tuple[int, ...]:
        """Return the ids of a process's cgroup and its ancestors, innermost first.

        Raise OSError if the process has exited, or its cgroup was removed.
        """
        known = self._known.get(cgroup)
        if known is None:
            known = tuple(procfs.cgroups(pid, self._root))
            if known[:1] == (cgroup,):  # otherwise the process has just moved
                self._known[cgroup] = known
        return known

    def owner(self, pid: int, cgroup: int, levels: Collection[int]) -> int:
        """Return the id of the process's bound owner. `levels`: the process's levels. Raise OSError on failure."""
        if cgroup not in self._owners:
            path = procfs.cgroup_path(pid)
            self._owners[cgroup] = owner_of(self._root, path, levels.__contains__).cgroup if path else cgroup
        return self._owners[cgroup]

    def forget(self) -> None:
        """Clear the cache.

        The caller calls this method regularly, because owners change, and most entries are never used again.
        """
        self._known.clear()
        self._owners.clear()


class LedgerCache:
    """Lookups in the ledger, cached for one iteration. Every lookup may raise OSError."""

    def __init__(self, ledger: Ledger, epoch: int, devices: Sequence[tuple[int, bytes]], lineages: Lineages) -> None:
        self._ledger, self.epoch, self._devices, self._lineages = ledger, epoch, devices, lineages
        self._resolved: dict[int, Resolution | None] = {}
        self._missing: dict[int, bool] = {}
        self._states: dict[int, ManagedState] = {}
        self._files: dict[File, int | None] = {}
        self._grants: dict[tuple[int, ...], Grant | None] = {}
        self._fds: list[int] = []

    def close(self) -> None:
        """Close the descriptors at the end of the iteration."""
        while self._fds:
            os.close(self._fds.pop())

    def full(self) -> bool:
        """Return True if no more descriptors may be opened."""
        return len(self._fds) >= MOST_PAGES

    def managed_state(self, pid: int, cgroup: int) -> ManagedState:
        """Return whether a process of this cgroup is managed, its levels and its bound owner; cached by cgroup.

        A parked process keeps its levels, even in another cgroup.
        """
        known = self._states.get(cgroup)
        if known is None:
            ids = self._lineages.of(pid, cgroup)
            known = managed_state(self, ids)
            known = known._replace(owner=self._lineages.owner(pid, cgroup, known.levels))
            if ids[:1] == (cgroup,):
                self._states[cgroup] = known
        process = self._ledger.process(pid)
        if process and process.is_parked and process.levels:
            return known._replace(managed=True, tenant=process.levels[0], levels=process.levels, refused=False)
        return known

    def resolved(self, cgroup: int) -> Resolution | None:
        """Return the agent's decision about a cgroup; None: no decision yet."""
        if cgroup not in self._resolved:
            self._resolved[cgroup] = self._ledger.resolution(cgroup)
        return self._resolved[cgroup]

    def page_missing(self, cgroup: int) -> bool:
        """Return True if the level has no page."""
        if cgroup not in self._missing:
            self._missing[cgroup] = self._ledger.page_missing(cgroup)
        return self._missing[cgroup]

    def probed(self, files: Mapping[File, int]) -> bool:
        """Return True if all files are probed, and each given offset is the offset of the file's checked breakpoint.

        Args:
            files: the files that a process maps, each with the offset of the breakpoint that was found in its memory.
        """
        return all(self._check(file) == seen for file, seen in files.items())

    def _check(self, file: File) -> int | None:
        if file not in self._files:
            self._files[file] = self._ledger.file_check(*file)
        return self._files[file]

    def grant(self, levels: tuple[int, ...]) -> Grant | None:
        """Return the pages for processes of these levels; None: a limit was decided, but is not in force yet."""
        if levels not in self._grants:
            self._grants[levels] = self._make_grant(levels)
        return self._grants[levels]

    def _make_grant(self, levels: tuple[int, ...]) -> Grant | None:
        usage = []
        for level in levels:
            fd = self._ledger.page_fd(level)
            if fd is None:
                return None
            self._fds.append(fd)
            usage.append(fd)
        allowed = (d for d in self._devices if any(self._ledger.limit(level, d[0]) is not None for level in levels))
        header = PageHeader(ControlFlag.MANAGED, tuple(allowed))
        if self._uses_mps(levels, {index for index, _ in header.devices}):
            header = header._replace(flags=ControlFlag.MANAGED | ControlFlag.MPS)
        return Grant(header, tuple(usage))

    def _uses_mps(self, levels: tuple[int, ...], allowed: set[int]) -> bool:
        """Return whether programs with a share of time use MPS. A program uses MPS on all its devices or on none.

        If one of the levels is isolated, the program does not use MPS.
        """
        times = self._ledger.times
        if not allowed or not allowed <= times.concurrent():
            return False
        shares = [share for level in levels for device in allowed if (share := times.share(level, device))]
        return bool(shares) and not any(share.isolated for share in shares)
