"""Places for levels: how many each owner of bounds has, and whether there is one more for it.

The kernel has a page for each level, and as many pages as levels. Where a level has no place its programs get no
memory (`Enforcer.answer`). Half of all places are kept for owners that have few.

Owns: the count of levels of each owner, and the words for why there is none more. Never: puts a limit in force. On
failure: OSError of the kernel's table of owners.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from fgpu_ebpf import bpf
from fgpu_ebpf.bound_owner import Owner, owner_of
from fgpu_ebpf.bounds import Bounds, refusal
from fgpu_ebpf.owner_table import COUNTED, OwnerTable
from fgpu_ebpf.tenants import Tenant

PLACES = bpf.MOST_INNER
FEW = 16  # levels of an owner for which half of all places are kept


class LevelPlaces:
    """The levels of one host. `taken`: how many pages the kernel has; without a `table` its programs know no owners."""

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
        self._slots: dict[int, int] = {}
        self._levels = Counter[int]()  # of an owner, by its cgroup

    def owner(self, path: str, level: int = 0) -> Owner:
        """The owner of a cgroup's bounds. `level`: a cgroup that is about to be a level."""
        return owner_of(self._root, path, lambda cgroup: cgroup in self._owners or cgroup == level != 0)

    def divide(self, tenants: Iterable[Tenant]) -> tuple[list[Tenant], dict[int, str]]:
        """Those of these tenants that have a place or get one, and why the others get none, by cgroup."""
        fit, lacks, new = list[Tenant](), dict[int, str](), Counter[int]()
        for tenant in tenants:
            why = "" if tenant.cgroup in self._owners else self._lack(tenant, new)
            if why:
                lacks[tenant.cgroup] = why
            else:
                fit.append(tenant)
        return fit, lacks

    def _lack(self, tenant: Tenant, new: Counter[int]) -> str:
        """Why there is no place for one level more; empty: there is. `new`: levels that are about to be entered, to
        which this one is added.
        """
        owner = self.owner(tenant.path, tenant.cgroup)
        has, taken = self._levels[owner.cgroup] + new[owner.cgroup], self._taken() + new.total()
        if has >= self.bounds.levels:
            return f"no place for its limit: {refusal(str(owner), 'levels', has, self.bounds.levels)}"
        if taken >= PLACES:
            return f"no place for its limit: all {PLACES} levels that this host may have are taken"
        if taken >= PLACES // 2 and has >= FEW:
            return (
                f"no place for its limit: {taken} of the host's {PLACES} levels are taken, and those that are left are "
                f"for workloads with at most {FEW}; {owner} has {has}"
            )
        new[owner.cgroup] += 1
        return ""

    def enter(self, cgroup: int, path: str) -> None:
        """The cgroup has a level. Raises OSError."""
        owner = self.owner(path, cgroup)
        if owner == self._owners.get(cgroup):
            return
        self._leave(cgroup)
        if self._table:
            in_use = self._levels.keys()
            self._slots[cgroup] = self._table.attach(cgroup, owner.cgroup, self.bounds.entries(), in_use)
        self._owners[cgroup], self._paths[cgroup] = owner, path
        self._levels[owner.cgroup] += 1
        if owner.cgroup == cgroup:
            self._renew_inside(path)

    def _renew_inside(self, path: str) -> None:
        """The owner of the levels inside this one may be another."""
        for cgroup, inside in list(self._paths.items()):
            if inside.startswith(f"{path}/"):
                self.enter(cgroup, inside)

    def leave(self, cgroup: int) -> None:
        """The cgroup has no level any more."""
        owner, path = self._owners.get(cgroup), self._paths.get(cgroup, "")
        self._leave(cgroup)
        if owner and owner.cgroup == cgroup:
            self._renew_inside(path)

    def _leave(self, cgroup: int) -> None:
        owner = self._owners.pop(cgroup, None)
        self._slots.pop(cgroup, None)
        self._paths.pop(cgroup, None)
        if owner:
            self._levels[owner.cgroup] -= 1
            if not self._levels[owner.cgroup]:
                del self._levels[owner.cgroup]

    def keep_only(self, cgroups: Collection[int]) -> None:
        """No other cgroup has a level."""
        for cgroup in [cgroup for cgroup in self._owners if cgroup not in cgroups]:
            self.leave(cgroup)

    def slot(self, cgroup: int) -> int:
        """The slot of a level's owner in the kernel's table; 0: it has none."""
        return self._slots.get(cgroup, 0)

    def crowds(self, paths: Sequence[str]) -> list[str]:
        """Of the maps that all tenants share: what the owners of these cgroups have too much of."""
        owners = {owner.cgroup: owner for owner in map(self.owner, paths)}
        return [text for owner in owners.values() for text in self._crowds(owner)]

    def _crowds(self, owner: Owner) -> list[str]:
        share = self._table.share(owner.cgroup) if self._table else None
        keys = zip((*COUNTED, "orphans"), self.bounds.entries(), strict=True)
        has = share.entries if share else ()
        return [refusal(str(owner), key, n, most) for (key, most), n in zip(keys, has, strict=False) if n >= most]
