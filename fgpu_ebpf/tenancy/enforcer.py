"""The enforcer, which puts tenants' limits in force in the kernel, within the memory of the devices.

The module runs in the agent's main loop. `tenant` determines a tenant's limits, and `device_commitments` determines on
which devices the limits count. This module writes only limits. The kernel alone changes the bytes in use.

A tenant gets its entry in the kernel's map `resolved` when its first process registers or is charged, or when a limit
is set by hand. Without an entry, the gatekeeper sends the agent a request about a process that registers.
`onBypass: kill` is not applied in a tenant that contains a preexisting process, because a preexisting process cannot
have the shim.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.level_limits import LevelLimits
from fgpu_ebpf.ledger.process_entry import levels_of
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.policy.rules import Device
from fgpu_ebpf.tenancy.device_commitments import Commitments, counts, counts_by_device
from fgpu_ebpf.tenancy.level_capacity import LevelCapacity
from fgpu_ebpf.tenancy.moves import Moves, levels_at
from fgpu_ebpf.tenancy.preexisting import PreexistingProcesses
from fgpu_ebpf.tenancy.tenant import Tenant
from fgpu_ebpf.tenancy.tenant_names import TenantNames
from fgpu_ebpf.tenancy.tenant_tree import TenantTree, below
from fgpu_ebpf.tenancy.unmanaged_cgroups import UnmanagedCgroups
from fgpu_ebpf.workloads.cgroups import Workloads


class RoomError(Exception):
    """The error of a limit that does not fit beside the limits of other tenants, or for which no level is free.

    The text has the numbers.
    """


class Enforcer:
    """The tenants and their limits in force. `overcommit`: the sum of limits may exceed a device's memory."""

    def __init__(
        self,
        ledger: Ledger,
        workloads: Workloads,
        devices: Sequence[Device],
        overcommit: bool,
        preexisting: PreexistingProcesses | None = None,
        places: LevelCapacity | None = None,
    ) -> None:
        self.preexisting = preexisting or PreexistingProcesses()
        self._spared = self.preexisting.places()
        self._ledger = ledger
        self._workloads = workloads
        self.places = places or LevelCapacity(workloads.root)
        self.answered = UnmanagedCgroups(ledger, self.places.bounds.unmanaged)
        self._tree = TenantTree()
        self.context_bytes = ledger.context_bytes
        self.commitments = Commitments(self._tree, devices, overcommit)
        self.get, self.at, self.around = self._tree.get, self._tree.at, self._tree.around
        self.has_inside = self._tree.has_inside
        self.names = TenantNames()
        self.moves = Moves(ledger, workloads.root, self._tree)
        self.since: dict[int, float] = {}
        """The time of a cgroup's first limit, in seconds since boot, if this time is after the agent's start."""
        self.leaving: dict[int, bool] = {}
        """The cgroups to release when their parked processes run. The value is whether their pages stay."""
        self.makes_room = False
        """True if requests wait while room is made for the requests on a full device."""

    # -- the managed cgroups

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)

    def name_of(self, cgroup: int) -> str:
        """Return the tenant's name, or an empty text if the cgroup is not a tenant."""
        tenant = self.get(cgroup)
        return tenant.name if tenant else ""

    def name_at(self, path: str) -> str:
        """Return the name of the innermost tenant that contains this cgroup, or an empty text."""
        levels = self.levels(path)
        return self.name_of(levels[0]) if levels else ""

    def named(self, name: str) -> Tenant | None:
        """Return the tenant with this name, or None."""
        return self.get(self.names.owner(name) or -1)

    def levels(self, path: str) -> tuple[int, ...]:
        """Return the outermost LEVELS managed cgroups on a path, as in the kernel, innermost first."""
        return levels_at(self._workloads.root, self._tree, path)

    def groups(self) -> set[int]:
        """Return the cgroups of tenants that have tenants inside."""
        return {group.cgroup for tenant in self for group in self.around(tenant)}

    # -- putting in force

    def adopt(self, tenant: Tenant, devices: Iterable[int]) -> None:
        """Enter a level with the limits that are pinned in the kernel, without writing to the kernel.

        Args:
            tenant: the level. Limits that counted continue to count.
            devices: the devices on which the limit was granted or denied.
        """
        (tenant,) = self.names.named([tenant])
        self._enter(tenant)
        self.names.enter([tenant])
        self.commitments.adopt(tenant, devices)

    def keep(self, kept: Tenant) -> None:
        """Keep the pinned limits of an adopted level, and take the workload, notes and labels from `kept`."""
        had = self.get(kept.cgroup)
        assert had
        self.leaving.pop(kept.cgroup, None)
        self._tree.replace(replace(had, workload=kept.workload, notes=kept.notes, metric_labels=kept.metric_labels))

    def put(self, tenants: Iterable[Tenant]) -> None:
        """Put limits in force, even for processes that already run.

        Raises:
            RoomError: a limit set by hand does not fit, or no level can be added. Nothing has changed.
            OSError: a map of the kernel is full. Some of the limits may be in force.
        """
        tenants = self.names.named(tenants)
        changed = [t for t in tenants if self.get(t.cgroup) != t]
        for tenant in changed:
            if tenant.by_hand and (shortage := self.commitments.shortage(tenant)):
                raise RoomError(shortage)
        for tenant in tenants:
            self.leaving.pop(tenant.cgroup, None)
        if not changed:
            return
        _, shortages = self.places.divide(changed)
        if shortages:
            raise RoomError(next(iter(shortages.values())))
        new = {t.cgroup for t in changed if self._ledger.page_missing(t.cgroup)}
        try:
            with self._unless_refused():
                inside = self._enter_all(changed)
                so_far, levels = self._ledger.processes_so_far(), [self._in_force(t) for t in (*changed, *inside)]
                self._ledger.set_limits(levels, lambda new: self.moves.published(new, so_far))
                self._ledger.times.set_shares({t.cgroup: t.shares for t in changed})
        except OSError:
            self._remove(new, new)
            raise
        self.names.enter(changed)
        self.since |= dict.fromkeys(new, time.clock_gettime(time.CLOCK_BOOTTIME))
        if new:
            self.moves.take_over(new)
            self._ask_again([tenant for tenant in changed if tenant.cgroup in new])
        for cgroup in self._in_use(changed):
            self.use(cgroup)
        self._retry_denied()

    def _enter_all(self, tenants: Sequence[Tenant]) -> list[Tenant]:
        """Enter tenants in memory.

        If limits of tenants inside a group counted on a device, the group's limit counts on that device immediately.

        Returns:
            The tenants inside these tenants whose own limits begin or cease to count.
        """
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
        """Grant the limits of tenants below these paths again, after a change of the levels around these tenants."""
        prefixes = tuple(below(path) for path in paths if self._tree.has_inside(path))
        inside = [tenant for tenant in self if tenant.path.startswith(prefixes)] if prefixes else []
        for tenant in inside:
            self.commitments.renew(tenant)
        in_use = set(self._in_use(inside))
        for tenant in inside:
            if tenant.cgroup in in_use:
                self._commit_used(tenant)  # the caller writes the limits of all tenants in `inside` to the kernel
        return inside

    def _in_use(self, tenants: Iterable[Tenant]) -> list[int]:
        """Return the cgroups whose limits count from now on.

        The kernel's entries of processes are read only if the result depends on these entries.
        """
        certain = {t.cgroup for t in tenants if t.by_hand or self.commitments.is_used(t.cgroup)}
        open_ = [t.cgroup for t in tenants if t.cgroup not in certain]
        charged = levels_of(self._ledger.processes()) if open_ else set()
        return [t.cgroup for t in tenants if t.cgroup in certain or t.cgroup in charged]

    def _ask_again(self, new: Sequence[Tenant]) -> None:
        """Remove the kernel's entries in `resolved` for new tenants' cgroups, and make all programs register again."""
        self._ledger.unresolve([tenant.cgroup for tenant in new])
        if any(self._workloads.is_populated(tenant.path) for tenant in new):
            self._ledger.new_epoch()

    @contextlib.contextmanager
    def _unless_refused(self) -> Iterator[None]:
        """Undo the changes in memory if the kernel refuses a write. The next decision tries the write again."""
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
        spared = abi.LimitFlag.KILL if tenant.path in self._spared else 0
        waits = abi.LimitFlag.WAITS if self.makes_room and not tenant.observe else 0
        limits = self.commitments.in_force(tenant)  # lower than tenant.limits where an increase did not fit
        outside = {i: max(0, bytes_ - max(0, tenant.limits[i] - limits[i])) for i, bytes_ in tenant.outside.items()}
        return LevelLimits(
            tenant.cgroup, limits, tenant.flags & ~spared | waits, self.places.slot(tenant.cgroup),
            frozenset(self.commitments.uncommitted(tenant)), outside=outside,
        )  # fmt: skip

    def spares(self, tenant: Tenant) -> bool:
        """Return True if `onBypass: kill` is not applied because preexisting processes run in the tenant."""
        return tenant.kill and tenant.path in self._spared

    def update_spared(self) -> None:
        """Update the set of cgroups that contain preexisting processes, and the kill flags that depend on this set."""
        before, self._spared = self._spared, self.preexisting.places()
        changed = [t for path in before ^ self._spared if (t := self.at(path)) and t.kill]
        if changed:
            self._ledger.set_limits([self._in_force(tenant) for tenant in changed])

    def release(self, cgroups: Collection[int], kept: Set[int] = frozenset()) -> None:
        """Stop managing cgroups. The processes stay charged to the remaining levels around the cgroups.

        Levels of parked processes stay until these processes run: see `leaving`.

        Args:
            cgroups: the ids of the cgroups.
            kept: cgroups whose pages stay in the kernel, because the pages are charged for orphans.
        """
        held = {cgroup for p in self._ledger.processes().values() if p.is_parked for cgroup in p.levels}
        gone = set(cgroups) - held
        self.leaving |= {cgroup: cgroup in kept for cgroup in held.intersection(cgroups)}
        paths = [tenant.path for cgroup in gone if (tenant := self.get(cgroup)) and counts(tenant)]
        self._remove(gone, gone - kept)
        for cgroup in gone:
            self._forget(cgroup)
        self.names.forget(gone - kept)
        inside = self._renew_inside(paths)
        if inside:
            self._ledger.set_limits([self._in_force(tenant) for tenant in inside])
        self._retry_denied()

    def _remove(self, left: Set[int], removed: Set[int]) -> None:
        """Move processes out of the levels `left`, and remove the levels `removed` from the kernel.

        A process that begins before the removal may have a removed level. A second round moves such a process, because
        the process would not be charged in a later level of the same cgroup.
        """
        for _ in range(2):
            so_far = self._ledger.processes_so_far()
            for pid, process in self._ledger.processes().items():
                if left & set(process.levels):
                    self._ledger.move(pid, process.generation, tuple(c for c in process.levels if c not in left))
            self._ledger.remove(removed)
            if self._ledger.processes_so_far() == so_far:
                break

    def release_left(self) -> None:
        """Release the cgroups that could not be released because of parked processes, if these processes run now."""
        leaving, self.leaving = self.leaving, {}
        if leaving:
            self.release(leaving, {cgroup for cgroup, is_kept in leaving.items() if is_kept})

    def _forget(self, cgroup: int) -> None:
        self._tree.forget(cgroup)
        self.since.pop(cgroup, None)
        self.places.leave(cgroup)
        self.commitments.forget(cgroup)

    # -- first uses

    def use(self, cgroup: int) -> None:
        """Commit the limits that count from a tenant's first process on, and enter the tenant in the map `resolved`.

        If the limit counts on each device separately, the limit is committed on devices where the tenant already has
        memory. If the limit counts on all devices, the limit is committed on all devices.
        """
        tenant = self.get(cgroup)
        if tenant is None:
            return
        self._put_used([tenant])
        for level in reversed([tenant, *self.around(tenant)]):
            self._ledger.resolve(level.cgroup, True)

    def use_charged(self, levels: Iterable[int]) -> None:
        """Commit these levels' limits on devices with memory charged without admission. Raise OSError on failure."""
        self._put_used(t for cgroup in levels if (t := self.get(cgroup)) and counts_by_device(t))

    def _put_used(self, tenants: Iterable[Tenant]) -> None:
        changed = [unit for tenant in tenants if (unit := self._commit_used(tenant))]
        if changed:
            self._ledger.set_limits([self._in_force(unit) for unit in changed])

    def _commit_used(self, tenant: Tenant) -> Tenant | None:
        """Commit the limit of the outermost level around a tenant on the devices where this level has memory.

        Returns:
            The level if its limits in force change, or None.
        """
        unit = self.commitments.unit(tenant)
        new = self._first_used(unit) if unit else []
        if unit is None or not new:
            return None
        before = self._in_force(unit)
        self.commitments.commit(unit, new)
        return unit if self._in_force(unit) != before else None

    def _first_used(self, unit: Tenant) -> list[int]:
        """Return the undecided devices on which the limit of `unit` counts from now on."""
        new = sorted(self.commitments.undecided(unit))
        if not new or not counts_by_device(unit):
            return new
        usage = self._ledger.usage(unit.cgroup, new) or ()
        return [index for index, found in zip(new, usage, strict=False) if found.used or found.parked]

    def use_device(self, cgroup: int, index: int) -> str:
        """Commit the limit of a level on a device when a process first requests memory on the device.

        Returns:
            Why the limit does not fit, or an empty text if the limit fits.

        Raises:
            OSError: the limit cannot be written to the kernel's map.
        """
        tenant = self.get(cgroup)
        unit = self.commitments.unit(tenant) if tenant else None
        if tenant is None or unit is None:
            return ""
        shortage = self.commitments.commit(unit, [index])
        levels = [unit] if unit is tenant else [unit, tenant]  # a group may have got a limit after the request
        self._ledger.set_limits([self._in_force(level) for level in levels])
        return shortage

    def answer(self, path: str, lacking: Mapping[str, int] = MappingProxyType({})) -> None:
        """Write the decision for which a program in a cgroup waits: the limit, or that the cgroup is unmanaged.

        Args:
            path: the cgroup.
            lacking: cgroups, by path, that should have a limit and for which the kernel has no free slot. Programs in
                these cgroups get no memory, even if a limit holds around the cgroup.

        Raises:
            OSError: the decision cannot be written to the kernel's map.
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

    def _retry_denied(self) -> None:
        """Retry the limits and increases of limits that were denied, because capacity may have been freed."""
        with self._unless_refused():
            more = self.commitments.try_again()
            if more:
                self._ledger.set_limits([self._in_force(tenant) for tenant in more])

    def denied(self, cgroup: int) -> str:
        """Return why a tenant's limit is not in force, or an empty text if the limit is in force."""
        tenant = self.get(cgroup)
        if tenant is None:
            return ""
        if len(self.around(tenant)) >= abi.LEVELS:
            return f"at most {abi.LEVELS} levels of cgroups can have limits: the outer limits hold, this limit does not"
        if tenant.path.count("/") >= abi.DEPTH:
            return f"the cgroup is more than {abi.DEPTH - 1} levels below the root: the BPF programs search no deeper"
        return self.commitments.denied(tenant)
