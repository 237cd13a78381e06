"""What the ledger says in one turn of the gatekeeper's loop: everything that many callers ask for is looked up once.

Owns: the answers of one turn, and the descriptors of usage pages, which it closes. Never: outlives the turn, since what
was decided before a process connected must hold for its hello. When it fails: OSError of bpf(2) or of /proc.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.bound_owner import owner_of
from fgpu_ebpf.clients import Head
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.mappings import File
from fgpu_ebpf.pages import ControlFlag
from fgpu_ebpf.resolutions import Resolution

MOST_PAGES = 256


@dataclass(frozen=True, slots=True)
class Standing:
    """What the ledger says of a process's cgroups; `managed` is None while nothing is decided.

    `refused`: a limit is wanted that could not be put in force. `owner`: the cgroup whose bounds are the process's; 0:
    not known.
    """

    managed: bool | None
    tenant: int
    levels: tuple[int, ...] = ()
    refused: bool = False
    owner: int = 0


@dataclass(frozen=True, slots=True)
class Offer:
    """What a managed process gets: its control page's head, descriptors of its levels' usage pages, leaf first."""

    head: Head
    usage: tuple[int, ...]


class Decisions(Protocol):
    """The part of the ledger that tells who is managed."""

    def resolved(self, cgroup: int) -> Resolution | None:
        """What is decided about it; None: nothing."""

    def page_missing(self, cgroup: int) -> bool:
        """The level has no page."""


def standing(ledger: Decisions | None, ids: Sequence[int]) -> Standing:
    """Refused if any level is. Managed if any level is, with all that are, leaf first; else unmanaged if the cgroup
    itself is known to be: one that is new in an unmanaged one may be a tenant's, and the agent has not looked yet.
    Raises OSError.
    """
    said = {cgroup: ledger.resolved(cgroup) for cgroup in ids} if ledger else {}
    if Resolution.REFUSED in said.values():
        return Standing(False, ids[0], refused=True)
    in_force = (c for c in said if said[c] or (said[c] is None and ledger and not ledger.page_missing(c)))
    levels = tuple(in_force)[-pages.LEVELS :]  # as the kernel finds them: of too many, the outermost
    if any(said[cgroup] is None for cgroup in levels):
        return Standing(None, ids[0])  # in force, and nobody has used it yet: the agent wants to know first
    if levels:
        return Standing(True, levels[0], levels)
    leaf = ids[0] if ids else 0
    return Standing(None if said.get(leaf) is None else False, leaf)


class Lineages:
    """The cgroups around each, until `forget`: the kernel never gives a cgroup another parent, or its id to another."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[int, tuple[int, ...]] = {}
        self._owners: dict[int, int] = {}

    def of(self, pid: int, cgroup: int) -> tuple[int, ...]:
        """Ids of this process's cgroup and those around it, leaf first. Raises OSError: it is gone."""
        known = self._known.get(cgroup)
        if known is None:
            known = tuple(procfs.cgroups(pid, self._root))
            if known[:1] == (cgroup,):  # else it has just moved
                self._known[cgroup] = known
        return known

    def owner(self, pid: int, cgroup: int, levels: Collection[int]) -> int:
        """The cgroup whose bounds are this process's; `levels`: those around it."""
        if cgroup not in self._owners:
            path = procfs.cgroup_path(pid)
            self._owners[cgroup] = owner_of(self._root, path, levels.__contains__).cgroup if path else cgroup
        return self._owners[cgroup]

    def forget(self) -> None:
        """To be called now and then, since most cgroups never come again."""
        self._known.clear()
        self._owners.clear()


class Glance:
    """The ledger as it is in this turn. Raises OSError."""

    def __init__(self, ledger: Ledger, epoch: int, devices: Sequence[tuple[int, bytes]], lineages: Lineages) -> None:
        self._ledger, self.epoch, self._devices, self._lineages = ledger, epoch, devices, lineages
        self._flags = ControlFlag.MANAGED | (ControlFlag.SETTLE if ledger.settle() else 0)
        self._resolved: dict[int, Resolution | None] = {}
        self._missing: dict[int, bool] = {}
        self._standings: dict[int, Standing] = {}
        self._files: dict[File, int | None] = {}
        self._offers: dict[tuple[int, ...], Offer | None] = {}
        self._fds: list[int] = []

    def close(self) -> None:
        """The turn is over."""
        while self._fds:
            os.close(self._fds.pop())

    def full(self) -> bool:
        """It keeps as many descriptors as it may."""
        return len(self._fds) >= MOST_PAGES

    def standing(self, pid: int, cgroup: int) -> Standing:
        """What is decided about a process in this cgroup."""
        known = self._standings.get(cgroup)
        if known is None:
            ids = self._lineages.of(pid, cgroup)
            known = standing(self, ids)
            known = replace(known, owner=self._lineages.owner(pid, cgroup, known.levels))
            if ids[:1] == (cgroup,):
                self._standings[cgroup] = known
        return known

    def resolved(self, cgroup: int) -> Resolution | None:
        """What is decided about it; None: nothing."""
        if cgroup not in self._resolved:
            self._resolved[cgroup] = self._ledger.resolution(cgroup)
        return self._resolved[cgroup]

    def page_missing(self, cgroup: int) -> bool:
        """The level has no page."""
        if cgroup not in self._missing:
            self._missing[cgroup] = self._ledger.page_missing(cgroup)
        return self._missing[cgroup]

    def probed(self, files: Mapping[File, int]) -> bool:
        """Whether all these files are probed, and the breakpoint of each was seen at the offset given with it."""
        return all(self._check(file) == seen for file, seen in files.items())

    def _check(self, file: File) -> int | None:
        if file not in self._files:
            self._files[file] = self._ledger.file_check(*file)
        return self._files[file]

    def offer(self, levels: tuple[int, ...]) -> Offer | None:
        """What processes of these levels get; None: decided, but not in force yet."""
        if levels not in self._offers:
            self._offers[levels] = self._make_offer(levels)
        return self._offers[levels]

    def _make_offer(self, levels: tuple[int, ...]) -> Offer | None:
        usage = []
        for level in levels:
            fd = self._ledger.page_fd(level)
            if fd is None:
                return None
            self._fds.append(fd)
            usage.append(fd)
        allowed = (d for d in self._devices if any(self._ledger.limit(level, d[0]) is not None for level in levels))
        return Offer(Head(self._flags, tuple(allowed)), tuple(usage))
