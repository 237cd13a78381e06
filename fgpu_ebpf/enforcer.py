"""Puts tenants' limits in force, and keeps the sum of them within the devices.

Owns: the managed cgroups, and what each is granted. Never: decides what a tenant should get (`tenants` does), or adds
to `used`. On failure: RoomError where a limit that was set by hand does not fit; OSError of the kernel.

A limit counts against its device once it is used: when the first process of the tenant says hello or is charged, or
when it was set by hand; what was granted before a restart of the agent stays granted. Until then `resolved` says
nothing of the cgroup, and the gatekeeper sends the first hello to us. Inside a group that has a limit only the group
counts. No process is killed in a tenant that has one older than fgpu: none can have the shim.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.answered import Answered
from fgpu_ebpf.bell import Bell
from fgpu_ebpf.elders import Elders
from fgpu_ebpf.ledger import Ledger, LevelLimits
from fgpu_ebpf.level_places import LevelPlaces
from fgpu_ebpf.policy import Device
from fgpu_ebpf.processes import levels_of
from fgpu_ebpf.quantities import memory_text
from fgpu_ebpf.tenant_names import TenantNames
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
        self._capacity = {device.index: device.usable_bytes for device in devices}
        self.overcommit = overcommit
        self.places = places or LevelPlaces(workloads.root)
        self.answered = Answered(ledger, self.places.bounds.unmanaged)
        self._tenants: dict[int, Tenant] = {}
        self.names = TenantNames()
        self._paths: dict[str, int] = {}
        self._granted: dict[int, Mapping[int, int]] = {}  # what counts, by cgroup
        self._denied: dict[int, str] = {}
        self._inside: dict[str, int] = {}  # how many tenants lie below a path
        self._sums: dict[int, int] | None = None  # committed bytes by device, while known
        self.held_elsewhere: Callable[[int], int] = lambda _: 0  # bytes of a device that tenants left behind
        self._bell = Bell()
        self._seen: deque[tuple[set[int], int]] = deque()  # new levels, and how many processes there had been before

    # -- who is managed

    def __iter__(self) -> Iterator[Tenant]:
        return iter(list(self._tenants.values()))

    def __len__(self) -> int:
        return len(self._tenants)

    def get(self, cgroup: int) -> Tenant | None:
        """The tenant of a cgroup."""
        return self._tenants.get(cgroup)

    def name_of(self, cgroup: int) -> str:
        """The tenant's; empty where there is none."""
        tenant = self._tenants.get(cgroup)
        return tenant.name if tenant else ""

    def name_at(self, path: str) -> str:
        """The name of the tenant that this cgroup is in; empty: it is in none."""
        levels = self.levels(path)
        return self.name_of(levels[0]) if levels else ""

    def at(self, path: str) -> Tenant | None:
        """The tenant whose cgroup is exactly there."""
        return self._tenants.get(self._paths.get(path, -1))

    def named(self, name: str) -> Tenant | None:
        """The tenant of that name."""
        return self._tenants.get(self.names.owner(name) or -1)

    def levels(self, path: str) -> tuple[int, ...]:
        """The managed cgroups of a path, leaf first, as the kernel would find them: of too many, the outermost."""
        return tuple(c for c in procfs.cgroup_ids(self._workloads.root, path) if c in self._tenants)[-pages.LEVELS :]

    def around(self, tenant: Tenant) -> list[Tenant]:
        """The groups that a tenant lies in, innermost first."""
        return [group for path in _above(tenant.path) if (group := self.at(path))]

    def groups(self) -> set[int]:
        """Cgroups of tenants that have tenants inside."""
        return {group.cgroup for tenant in self for group in self.around(tenant)}

    # -- putting in force

    def add_device(self, device: Device) -> None:
        """Limits can be put in force on this one too from now on."""
        self._capacity[device.index] = device.usable_bytes
        self._sums = None

    def adopt(self, tenant: Tenant, is_used: bool) -> None:
        """Enters a level as the kernel has it pinned, and writes nothing: what it was granted stays granted."""
        (tenant,) = self.names.named([tenant])
        self._enter(tenant)
        self.names.enter([tenant])
        if is_used and any(tenant.limits.values()):
            self._granted[tenant.cgroup] = tenant.limits
        elif is_used:
            self._denied[tenant.cgroup] = "there was no room for it when the agent ended"
        self._sums = None

    def keep(self, tenant: Tenant) -> None:
        """An adopted level stays as it is pinned; only what is said of it changes."""
        before = self._tenants[tenant.cgroup]
        self._tenants[tenant.cgroup] = replace(before, workload=tenant.workload, notes=tenant.notes)

    def put(self, tenants: Iterable[Tenant]) -> None:
        """Puts these in force, their present processes included. RoomError: one set by hand does not fit; OSError: the
        kernel has no room; none is then.
        """
        changed = [t for t in self.names.named(tenants) if self._tenants.get(t.cgroup) != t]
        for tenant in changed:
            if tenant.by_hand and (lack := self._lack(tenant)):
                raise RoomError(lack)
        if not changed:
            return
        _, lacks = self.places.divide(changed)
        if lacks:
            raise RoomError(next(iter(lacks.values())))
        new = {t.cgroup for t in changed if self._ledger.page_missing(t.cgroup)}
        try:
            with self._unless_refused():
                for tenant in changed:
                    self._enter(tenant)
                so_far = self._ledger.processes_so_far()
                self._ledger.set_limits([self._in_force(t) for t in changed], lambda new: self._see(new, so_far))
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

    def _in_use(self, tenants: Iterable[Tenant]) -> list[int]:
        """Cgroups of tenants with a limit that counts from now on. Processes are read only if the result needs them."""
        certain = {t.cgroup for t in tenants if t.by_hand or t.cgroup in self._granted}
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
        book, promises = (self._tenants, self._paths, self._inside), (self._granted, self._denied)
        held: Sequence[dict[Any, Any]] = [*book, *promises]
        before = [dict(entries) for entries in held]
        try:
            yield
        except OSError:
            for entries, were in zip(held, before, strict=True):
                entries.clear()
                entries.update(were)
            self.places.keep_only(self._tenants.keys())
            self._sums = None
            raise

    def _enter(self, tenant: Tenant) -> None:
        before = self._tenants.get(tenant.cgroup)
        self.places.enter(tenant.cgroup, tenant.path)
        if before:
            self._count_inside(before.path, -1)
        self._count_inside(tenant.path, 1)
        if before and before.path != tenant.path:
            self._sums = None
        self._tenants[tenant.cgroup] = tenant
        self._paths[tenant.path] = tenant.cgroup
        if tenant.cgroup in self._granted or tenant.cgroup in self._denied:
            self._grant(tenant)

    def _count_inside(self, path: str, more: int) -> None:
        for above in _above(path):
            self._inside[above] = self._inside.get(above, 0) + more
            if not self._inside[above]:
                del self._inside[above]

    def _in_force(self, tenant: Tenant) -> LevelLimits:
        limits = dict.fromkeys(tenant.limits, 0) if tenant.cgroup in self._denied else self._limits(tenant)
        spared = pages.LimitFlag.KILL if tenant.path in self._spared else 0
        return LevelLimits(tenant.cgroup, limits, tenant.flags & ~spared, self.places.slot(tenant.cgroup))

    def spares(self, tenant: Tenant) -> bool:
        """It would be onBypass: kill, but for those in it that are older than fgpu."""
        return tenant.kill and tenant.path in self._spared

    def spare_elders(self) -> None:
        """Follows those who are older than fgpu, and takes them for gone when they are."""
        before, self._spared = self._spared, self.elders.places()
        changed = [t for path in before ^ self._spared if (t := self.at(path)) and t.kill]
        if changed:
            self._ledger.set_limits([self._in_force(tenant) for tenant in changed])

    def _limits(self, tenant: Tenant) -> Mapping[int, int]:
        """What it asked for, unless it grew where there was no room: then it keeps what it had."""
        return self._granted.get(tenant.cgroup) or tenant.limits

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
        for pid, process in self._ledger.processes().items():
            if gone & set(process.levels):
                self._ledger.move(pid, process.generation, tuple(c for c in process.levels if c not in gone))
        self._ledger.remove(gone - kept)
        for cgroup in gone:
            self._forget(cgroup)
        self.names.forget(gone - kept)
        self._try_those_who_lack()

    def _forget(self, cgroup: int) -> None:
        tenant = self._tenants.pop(cgroup, None)
        self.places.leave(cgroup)
        self._granted.pop(cgroup, None)
        self._denied.pop(cgroup, None)
        self._sums = None
        if tenant:
            self._count_inside(tenant.path, -1)
            if self._paths.get(tenant.path) == cgroup:
                del self._paths[tenant.path]

    # -- room on the devices

    def use(self, cgroup: int) -> None:
        """A process of the tenant is there: from now on its limit counts, if there is room; shims get their answer."""
        tenant = self._tenants.get(cgroup)
        if tenant is None:
            return
        levels = [tenant, *self.around(tenant)]
        unit = next((level for level in reversed(levels) if _counts(level)), None)
        if unit and unit.cgroup not in self._granted and unit.cgroup not in self._denied:
            self._grant(unit)
            if unit.cgroup in self._denied:
                self._ledger.set_limits([self._in_force(unit)])
        for level in reversed(levels):
            self._ledger.resolve(level.cgroup, True)

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

    def _grant(self, tenant: Tenant) -> None:
        lack, had = self._lack(tenant), self._granted.get(tenant.cgroup)
        self._denied.pop(tenant.cgroup, None)
        if lack and had is None:
            self._denied[tenant.cgroup] = lack
            return
        fits = {i: min(limit, had.get(i, 0)) for i, limit in tenant.limits.items()} if lack and had else tenant.limits
        self._granted[tenant.cgroup] = fits
        if had is not None or tenant.path in self._inside:
            self._sums = None
        elif self._sums:
            self._sums = {index: total + self._promise(tenant.cgroup, index) for index, total in self._sums.items()}

    def _try_those_who_lack(self) -> None:
        """There may be room now for those who were denied, or who grew in vain."""
        short = [c for c, granted in self._granted.items() if granted != self._tenants[c].limits]
        more = []
        with self._unless_refused():
            for cgroup in [*self._denied, *short]:
                before = self._granted.get(cgroup)
                self._grant(self._tenants[cgroup])
                if self._granted.get(cgroup) != before:
                    more.append(self._in_force(self._tenants[cgroup]))
            if more:
                self._ledger.set_limits(more)

    def _lack(self, tenant: Tenant) -> str:
        """Why its limits do not fit; empty: they do."""
        if self.overcommit or not _counts(tenant) or any(_counts(group) for group in self.around(tenant)):
            return ""
        for index, limit in tenant.limits.items():
            others = self.committed(index, tenant) + self.held_elsewhere(index)
            capacity = self._capacity.get(index, 0)
            if limit != pages.NO_LIMIT and others + min(limit, capacity) > capacity:
                return (
                    f"{memory_text(limit)} for {tenant.name} do not fit on device {index}: {memory_text(others)} of "
                    f"{memory_text(capacity)} are committed to others; lower a limit, or allow overcommit"
                )
        return ""

    def committed(self, index: int, but: Tenant | None = None) -> int:
        """Bytes of a device that are promised: where a group has a limit, its own and not those inside it."""
        if but and but.path in self._inside:
            inside = f"{but.path}/"
            others = (c for c in self._granted if not f"{self._tenants[c].path}/".startswith(inside))
            return sum(self._promise(cgroup, index) for cgroup in others)
        if self._sums is None:
            self._sums = {i: sum(self._promise(cgroup, i) for cgroup in self._granted) for i in self._capacity}
        own = self._promise(but.cgroup, index) if but and but.cgroup in self._granted else 0
        return self._sums.get(index, 0) - own

    def _promise(self, cgroup: int, index: int) -> int:
        """What counts of what one is granted: nothing inside a group that has a limit itself."""
        limit = self._granted[cgroup].get(index, 0)
        if limit == pages.NO_LIMIT:
            return 0
        around = self.around(self._tenants[cgroup])
        if any(_counts(group) and group.cgroup in self._granted for group in around):
            return 0
        return min(limit, self._capacity.get(index, 0))

    def denied(self, cgroup: int) -> str:
        """Why a tenant gets nothing although a policy gives it something; empty: it does."""
        tenant = self._tenants.get(cgroup)
        if tenant and len(self.around(tenant)) >= pages.LEVELS:
            return f"at most {pages.LEVELS} levels: the limits of the groups around it hold, its own does not"
        if tenant and tenant.path.count("/") >= pages.DEPTH:
            return f"it lies more than {pages.DEPTH - 1} cgroups below the root: the kernel's programs see none there"
        return (tenant and cgroup in self._denied and self._lack(tenant)) or self._denied.get(cgroup, "")


def _above(path: str) -> list[str]:
    """The paths around one, innermost first; the root has none."""
    parts = path.split("/")
    return [above for n in range(len(parts) - 1, 0, -1) if (above := "/".join(parts[:n]) or "/") != path]


def _counts(tenant: Tenant) -> bool:
    """Its limit is a promise: not where it only observes, or has none."""
    return not tenant.observe and any(limit != pages.NO_LIMIT for limit in tenant.limits.values())
