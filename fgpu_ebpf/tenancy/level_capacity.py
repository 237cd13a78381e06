"""The capacity for levels: the number of each bound owner's levels, the room for another level, and refused levels.

The kernel has a page for each level, and a fixed number of pages (PLACES). If there is no page for a level, the level's
programs get no memory (`Enforcer.answer`). Half of all pages are reserved for owners with few levels. The module runs
in the agent's main loop. Writes to the kernel's table of owners raise OSError.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from fgpu_ebpf.ledger.owner_bounds import Bounds, refusal
from fgpu_ebpf.ledger.owner_table import OwnerTable
from fgpu_ebpf.linux import bpf
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.tenant import Tenant
from fgpu_ebpf.tenancy.tenant_tree import below, count_inside
from fgpu_ebpf.workloads.bound_owner import Owner, owner_of

PLACES = bpf.MOST_INNER
FEW = 16  # owners with fewer levels than this may use the second half of all pages
PAUSE_SECONDS = 30.0  # at most one event in this time for each owner with refused levels
MOST_REPORTED = 256  # the most owners with an event in this time


class LevelCapacity:
    """The levels of one host.

    Args:
        root: the mount point of the cgroup hierarchy.
        bounds: the bounds of each owner, or None for the defaults.
        table: the kernel's table of owners, or None if the BPF programs do not count by owner.
        taken: a function that returns how many pages the kernel has in use.
    """

    def __init__(
        self,
        root: Path,
        bounds: Bounds | None = None,
        table: OwnerTable | None = None,
        taken: Callable[[], int] = lambda: 0,
    ) -> None:
        self.bounds = bounds or Bounds()
        self._root, self._table, self._taken = root, table, taken
        self._owners: dict[int, Owner] = {}  # by level
        self._paths: dict[int, str] = {}
        self._inside: dict[str, int] = {}  # the number of levels inside each path
        self._slots: dict[int, int] = {}
        self._levels = Counter[int]()  # the number of levels of each owner, by the owner's cgroup

    def owner(self, path: str, level: int = 0) -> Owner:
        """Return the owner of a cgroup's bounds. `level`: the id of a cgroup that will become a level."""
        return owner_of(self._root, path, lambda cgroup: cgroup in self._owners or cgroup == level != 0)

    def divide(self, tenants: Iterable[Tenant]) -> tuple[list[Tenant], dict[int, str]]:
        """Return the tenants that have or can get a page, and why the other tenants cannot get a page, by cgroup."""
        fit, shortages, new = list[Tenant](), dict[int, str](), Counter[int]()
        for tenant in tenants:
            why = "" if tenant.cgroup in self._owners else self._shortage(tenant, new)
            if why:
                shortages[tenant.cgroup] = why
            else:
                fit.append(tenant)
        return fit, shortages

    def _shortage(self, tenant: Tenant, new: Counter[int]) -> str:
        """Return why no level can be added for a tenant.

        The result is empty if a level can be added and was counted in `new`.

        Args:
            tenant: the tenant.
            new: the number of levels that will be entered, by owner.
        """
        owner = self.owner(tenant.path, tenant.cgroup)
        has, taken = self._levels[owner.cgroup] + new[owner.cgroup], self._taken() + new.total()
        if has >= self.bounds.levels:
            return f"no room for the limit: {refusal(str(owner), 'levels', has, self.bounds.levels)}"
        if taken >= PLACES:
            return f"no room for the limit: all {PLACES} levels that this host may have are taken"
        if taken >= PLACES // 2 and has >= FEW:
            return (
                f"no room for the limit: {taken} of the host's {PLACES} levels are taken, and the other levels are "
                f"reserved for workloads with fewer than {FEW} levels; {owner} has {has}"
            )
        new[owner.cgroup] += 1
        return ""

    def enter(self, cgroup: int, path: str) -> None:
        """Enter the level of a cgroup. Raise OSError if the kernel refuses the entry."""
        owner = self.owner(path, cgroup)
        if owner == self._owners.get(cgroup):
            return
        self._leave(cgroup)
        if self._table:
            in_use = self._levels.keys()
            most = self.bounds.entries(self._table.sizes)
            self._slots[cgroup] = self._table.attach(cgroup, owner.cgroup, most, in_use)
        self._owners[cgroup], self._paths[cgroup] = owner, path
        count_inside(self._inside, path, 1)
        self._levels[owner.cgroup] += 1
        if owner.cgroup == cgroup:
            self._renew_inside(path)

    def _renew_inside(self, path: str) -> None:
        """Enter the levels inside a path again, because the owner of these levels may have changed."""
        if path not in self._inside:  # without this check, many levels would take quadratic time
            return
        for cgroup, inside in list(self._paths.items()):
            if inside.startswith(below(path)):
                self.enter(cgroup, inside)

    def leave(self, cgroup: int) -> None:
        """Remove the level of a cgroup."""
        owner, path = self._owners.get(cgroup), self._paths.get(cgroup, "")
        self._leave(cgroup)
        if owner and owner.cgroup == cgroup:
            self._renew_inside(path)

    def _leave(self, cgroup: int) -> None:
        owner = self._owners.pop(cgroup, None)
        self._slots.pop(cgroup, None)
        count_inside(self._inside, self._paths.pop(cgroup, "/"), -1)
        if owner:
            self._levels[owner.cgroup] -= 1
            if not self._levels[owner.cgroup]:
                del self._levels[owner.cgroup]

    def keep_only(self, cgroups: Collection[int]) -> None:
        """Remove the levels of all cgroups except these."""
        for cgroup in [cgroup for cgroup in self._owners if cgroup not in cgroups]:
            self.leave(cgroup)

    def slot(self, cgroup: int) -> int:
        """Return the slot of the level's owner in the kernel's table, or 0 if the owner has no slot."""
        return self._slots.get(cgroup, 0)

    def crowds(self, paths: Sequence[str]) -> list[str]:
        """Return a text for each bound on the kernel's shared maps that an owner of these cgroups has reached."""
        owners = {owner.cgroup: owner for owner in map(self.owner, paths)}
        return [text for owner in owners.values() for text in self._crowds(owner)]

    def _crowds(self, owner: Owner) -> list[str]:
        if self._table is None or (share := self._table.share(owner.cgroup)) is None:
            return []
        found = zip((*self._table.sizes, "orphans"), share.entries, share.most, strict=True)
        return [refusal(str(owner), key, n, most) for key, n, most in found if n >= most]


class LevelRefusals:
    """The counter and reporter of levels that were refused because there was no room.

    There is at most one event for each bound owner in PAUSE_SECONDS, for any number of refused levels. `count`: the
    number of refusals since the agent's start.
    """

    def __init__(self, history: EventLog, places: LevelCapacity) -> None:
        self._history, self._places = history, places
        self._reported: dict[str, float] = {}
        self.count = 0

    def report(self, refused: Mapping[str, str]) -> None:
        """Count and report refused levels. `refused`: the reasons, by path."""
        self.count += len(refused)
        owners = {path: self._places.owner(path).path for path in refused}
        more, now = Counter(owners.values()), time.monotonic()
        self._reported = {owner: at for owner, at in self._reported.items() if now - at < PAUSE_SECONDS}
        for path, owner in owners.items():
            if owner not in self._reported and len(self._reported) < MOST_REPORTED:
                self._reported[owner] = now
                others = f", and {more[owner] - 1} more cgroups of this workload" if more[owner] > 1 else ""
                self._history.add("no room", tenant=path, text=f"{refused[path]}{others}")
