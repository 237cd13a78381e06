"""Puts tenants' limits in force, and keeps the sum of them within the devices.

Owns: the managed cgroups. Never: decides what a tenant should get (`tenants` does) or where its limit counts
(`commitments` does), or adds to `used`. On failure: RoomError where a limit that was set by hand does not fit; OSError
of the kernel.

Until the first process of a tenant says hello or is charged, `resolved` says nothing of its cgroup, and the gatekeeper
sends that hello to us. No process is killed in a tenant that has one older than fgpu: none can have the shim.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.answered import Answered
from fgpu_ebpf.bell import Bell
from fgpu_ebpf.commitments import Commitments, counts, counts_by_device
from fgpu_ebpf.elders import Elders
from fgpu_ebpf.ledger import Ledger, LevelLimits
from fgpu_ebpf.level_places import LevelPlaces
from fgpu_ebpf.policy import Device
from fgpu_ebpf.processes import levels_of
from fgpu_ebpf.tenant_names import TenantNames
from fgpu_ebpf.tenant_tree import TenantTree, below
from fgpu_ebpf.tenants import Tenant
from fgpu_ebpf.workloads import Workloads


class RoomError(Exception):
    """The limit does not fit on a device beside the others; the text has the numbers."""


class Enforcer:
    """What is in force. `overcommit`: limits may sum past a device."""

    def __init__(
        self,
        ledger: Ledger,
        workloads: Workloads,
        devices: Sequence[Device],
        overcommit: bool,
        elders: Elders | None = None,
        places: LevelPlaces | None = None,
    ) -> None:
        self.elders = elders or Elders()
        self._spared = self.elders.places()
        self._ledger = ledger
        self._workloads = workloads
        self.places = places or LevelPlaces(workloads.root)
        self.answered = Answered(ledger, self.places.bounds.unmanaged)
        self._tree = TenantTree()
        self.commitments = Commitments(self._tree, devices, overcommit)
        self.get, self.at, self.around = self._tree.get, self._tree.at, self._tree.around
        self.names = TenantNames()
        self._bell = Bell()
        self._seen: deque[tuple[set[int], int]] = deque()  # new levels, and how many processes there had been before

    # -- who is managed

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)

    def name_of(self, cgroup: int) -> str:
        """The tenant's; empty where there is none."""
        tenant = self.get(cgroup)
        return tenant.name if tenant else ""

    def name_at(self, path: str) -> str:
        """The name of the tenant that this cgroup is in; empty: it is in none."""
        levels = self.levels(path)
        return self.name_of(levels[0]) if levels else ""

    def named(self, name: str) -> Tenant | None:
        """The tenant of that name."""
        return self.get(self.names.owner(name) or -1)

    def levels(self, path: str) -> tuple[int, ...]:
        """The managed cgroups of a path, leaf first, as the kernel would find them: of too many, the outermost."""
        return tuple(c for c in procfs.cgroup_ids(self._workloads.root, path) if c in self._tree)[-pages.LEVELS :]

    def groups(self) -> set[int]:
        """Cgroups of tenants that have tenants inside."""
        return {group.cgroup for tenant in self for group in self.around(tenant)}

    # -- putting in force

    def adopt(self, tenant: Tenant, devices: Iterable[int]) -> None:
        """Enters a level as the kernel has it pinned, and writes nothing: where it counted, it still counts.

        `devices`: on which its limit was granted or denied.
        """
        (tenant,) = self.names.named([tenant])
        self._enter(tenant)
        self.names.enter([tenant])
        self.commitments.adopt(tenant, devices)

    def keep(self, tenant: Tenant) -> None:
        """An adopted level stays as it is pinned; only what is said of it changes."""
        before = self.get(tenant.cgroup)
        assert before
        self._tree.replace(replace(before, workload=tenant.workload, notes=tenant.notes))

    def put(self, tenants: Iterable[Tenant]) -> None:
        """Puts these in force, their present processes included. RoomError: one set by hand does not fit; OSError: the
        kernel has no room; none is then.
        """
        changed = [t for t in self.names.named(tenants) if self.get(t.cgroup) != t]
        for tenant in changed:
            if tenant.by_hand and (lack := self.commitments.lack(tenant)):
                raise RoomError(lack)
        if not changed:
            return
        _, lacks = self.places.divide(changed)
        if lacks:
            raise RoomError(next(iter(lacks.values())))
        new = {t.cgroup for t in changed if self._ledger.page_missing(t.cgroup)}
        try:
            with self._unless_refused():
                inside = self._enter_all(changed)
                so_far, levels = self._ledger.processes_so_far(), [self._in_force(t) for t in (*changed, *inside)]
                self._ledger.set_limits(levels, lambda new: self._see(new, so_far))
                self._ledger.times.set_shares({t.cgroup: t.shares for t in changed})
        except OSError:
            self._ledger.remove(new)
            raise
        self.names.enter(changed)
        if new:
            self._take_over(new)
            self._ask_again([tenant for tenant in changed if tenant.cgroup in new])
        for cgroup in self._in_use(changed):
            self.use(cgroup)
        self._try_those_who_lack()

    def _enter_all(self, tenants: Sequence[Tenant]) -> list[Tenant]:
        """Returns other tenants inside these: their limits count no longer, or again. A group counts where they did."""
        before = {tenant.cgroup: self.get(tenant.cgroup) for tenant in tenants}
        counted = {t.cgroup: self.commitments.granted_inside(t) for t in tenants if counts(t)}
        for tenant in tenants:
            self._enter(tenant)
        for cgroup, devices in counted.items():
            group = self.get(cgroup)
            if group and devices and self.commitments.unit(group) is group:
                self.commitments.commit(group, devices)
        groups = [t for t in tenants if counts(t) != ((was := before[t.cgroup]) is not None and counts(was))]
        return self._renew_inside(group.path for group in groups)

    def _renew_inside(self, paths: Iterable[str]) -> list[Tenant]:
        """The tenants below these paths, of which other levels decide than before."""
        prefixes = tuple(below(path) for path in paths if self._tree.has_inside(path))
        inside = [tenant for tenant in self if tenant.path.startswith(prefixes)] if prefixes else []
        for tenant in inside:
            self.commitments.renew(tenant)
        in_use = set(self._in_use(inside))
        for tenant in inside:
            if tenant.cgroup in in_use:
                self._commit_used(tenant)  # the caller tells the kernel of all of these
        return inside

    def _in_use(self, tenants: Iterable[Tenant]) -> list[int]:
        """Cgroups of tenants with a limit that counts from now on. Processes are read only if the result needs them."""
        certain = {t.cgroup for t in tenants if t.by_hand or self.commitments.is_used(t.cgroup)}
        open_ = [t.cgroup for t in tenants if t.cgroup not in certain]
        charged = levels_of(self._ledger.processes()) if open_ else set()
        return [t.cgroup for t in tenants if t.cgroup in certain or t.cgroup in charged]

    def _ask_again(self, new: Sequence[Tenant]) -> None:
        """What was decided of a cgroup before it was a tenant does not hold; programs in it say hello again."""
        self._ledger.unresolve([tenant.cgroup for tenant in new])
        if any(self._workloads.is_populated(tenant.path) for tenant in new):
            self._ledger.new_epoch()

    @contextlib.contextmanager
    def _unless_refused(self) -> Iterator[None]:
        """What the kernel does not take was never entered, so that it is tried again."""
        tree, commitments = self._tree.save(), self.commitments.save()
        try:
            yield
        except OSError:
            self._tree.restore(tree)
            self.commitments.restore(commitments)
            self.places.keep_only(self._tree.cgroups())
            raise

    def _enter(self, tenant: Tenant) -> None:
        self.places.enter(tenant.cgroup, tenant.path)
        self._tree.enter(tenant)
        self.commitments.renew(tenant)

    def _in_force(self, tenant: Tenant) -> LevelLimits:
        spared = pages.LimitFlag.KILL if tenant.path in self._spared else 0
        return LevelLimits(
            tenant.cgroup, self.commitments.in_force(tenant), tenant.flags & ~spared, self.places.slot(tenant.cgroup),
            frozenset(self.commitments.uncommitted(tenant)),
        )  # fmt: skip

    def spares(self, tenant: Tenant) -> bool:
        """It would be onBypass: kill, but for those in it that are older than fgpu."""
        return tenant.kill and tenant.path in self._spared

    def spare_elders(self) -> None:
        """Follows those who are older than fgpu, and takes them for gone when they are."""
        before, self._spared = self._spared, self.elders.places()
        changed = [t for path in before ^ self._spared if (t := self.at(path)) and t.kill]
        if changed:
            self._ledger.set_limits([self._in_force(tenant) for tenant in changed])

    def _see(self, cgroups: set[int], so_far: int) -> None:
        """Every program in the kernel sees these levels; on any thread."""
        self._seen.append((cgroups, so_far))
        self._bell.ring()

    def fileno(self) -> int:
        """Readable when there may be somebody to take over, who was named when a level was being put in force."""
        return self._bell.fileno()

    def take_over_late(self) -> None:
        """Of whom the kernel had looked up the levels just before there was one more, and entered them just after."""
        self._bell.hush()
        seen = [self._seen.popleft() for _ in range(len(self._seen))]
        now = self._ledger.processes_so_far()
        late = {cgroup for cgroups, so_far in seen if so_far != now for cgroup in cgroups}
        if late:
            self._take_over(late)

    def _take_over(self, cgroups: set[int]) -> None:
        """Charges that processes of new levels have already come along; the rest NVML shows at the next reconcile."""
        known = self._ledger.processes()
        for pid, process in known.items():
            path = procfs.cgroup_path(pid)
            levels = self.levels(path) if path else ()
            if cgroups & set(levels):
                self._ledger.move(pid, process.generation, levels)

    def release(self, cgroups: Collection[int], kept: Set[int] = frozenset()) -> None:
        """These are managed no longer; their processes' charges stay with the levels that are left.

        `kept`: cgroups whose pages stay in the kernel, for what is orphaned there.
        """
        gone = set(cgroups)
        paths = [tenant.path for cgroup in gone if (tenant := self.get(cgroup)) and counts(tenant)]
        for pid, process in self._ledger.processes().items():
            if gone & set(process.levels):
                self._ledger.move(pid, process.generation, tuple(c for c in process.levels if c not in gone))
        self._ledger.remove(gone - kept)
        for cgroup in gone:
            self._forget(cgroup)
        self.names.forget(gone - kept)
        inside = self._renew_inside(paths)
        if inside:
            self._ledger.set_limits([self._in_force(tenant) for tenant in inside])
        self._try_those_who_lack()

    def _forget(self, cgroup: int) -> None:
        self._tree.forget(cgroup)
        self.places.leave(cgroup)
        self.commitments.forget(cgroup)

    # -- first uses

    def use(self, cgroup: int) -> None:
        """A process of the tenant is there: shims get their answer. Where its limit counts on all its devices at once,
        or it has memory already, it counts from now on, if there is room.
        """
        tenant = self.get(cgroup)
        if tenant is None:
            return
        self._put_used([tenant])
        for level in reversed([tenant, *self.around(tenant)]):
            self._ledger.resolve(level.cgroup, True)

    def use_charged(self, levels: Iterable[int]) -> None:
        """Limits of these levels count where a process has memory that it did not ask for. Raises OSError."""
        self._put_used(t for cgroup in levels if (t := self.get(cgroup)) and counts_by_device(t))

    def _put_used(self, tenants: Iterable[Tenant]) -> None:
        changed = [unit for tenant in tenants if (unit := self._commit_used(tenant))]
        if changed:
            self._ledger.set_limits([self._in_force(unit) for unit in changed])

    def _commit_used(self, tenant: Tenant) -> Tenant | None:
        """Lets the tenant's unit count where it has memory; returns the unit if the kernel has to be told."""
        unit = self.commitments.unit(tenant)
        new = self._first_used(unit) if unit else []
        if unit is None or not new:
            return None
        before = self._in_force(unit)
        self.commitments.commit(unit, new)
        return unit if self._in_force(unit) != before else None

    def _first_used(self, unit: Tenant) -> list[int]:
        """Devices on which its limit is to count from now on."""
        new = sorted(self.commitments.undecided(unit))
        if not new or not counts_by_device(unit):
            return new
        usage = self._ledger.usage(unit.cgroup, new) or ()
        return [index for index, found in zip(new, usage, strict=False) if found.used]

    def use_device(self, cgroup: int, index: int) -> str:
        """A process asks for the first memory of a device at this level, which the kernel has as uncommitted there;
        returns why there is no room, or empty. Raises OSError.
        """
        tenant = self.get(cgroup)
        unit = self.commitments.unit(tenant) if tenant else None
        if tenant is None or unit is None:
            return ""
        lack = self.commitments.commit(unit, [index])
        levels = [unit] if unit is tenant else [unit, tenant]  # a group around it may have a limit since
        self._ledger.set_limits([self._in_force(level) for level in levels])
        return lack

    def answer(self, path: str, lacking: Mapping[str, int] = MappingProxyType({})) -> None:
        """A program in this cgroup waits for what was decided: its limit is used now, or it is known to have none.

        `lacking`: cgroups that are to have a limit and have no place for it, by path: whatever holds around one, its
        programs get no memory. Raises OSError.
        """
        levels, owner = self.levels(path), self.places.owner(path).cgroup
        refused = [around for around in procfs.and_above(path) if around in lacking]
        for around in refused:
            self.answered.refuse(owner, lacking[around], around)
        if levels and not refused:
            self.use(levels[0])
        elif not refused:
            for cgroup in list(procfs.cgroup_ids(self._workloads.root, path))[:1]:
                self.answered.unmanaged(owner, cgroup)

    def _try_those_who_lack(self) -> None:
        """There may be room now for those who were denied, or who grew in vain."""
        with self._unless_refused():
            more = self.commitments.try_again()
            if more:
                self._ledger.set_limits([self._in_force(tenant) for tenant in more])

    def denied(self, cgroup: int) -> str:
        """Why a tenant gets nothing although a policy gives it something; empty: it does."""
        tenant = self.get(cgroup)
        if tenant is None:
            return ""
        if len(self.around(tenant)) >= pages.LEVELS:
            return f"at most {pages.LEVELS} levels: the limits of the groups around it hold, its own does not"
        if tenant.path.count("/") >= pages.DEPTH:
            return f"it lies more than {pages.DEPTH - 1} cgroups below the root: the kernel's programs see none there"
        return self.commitments.denied(tenant)
