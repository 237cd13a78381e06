"""Which limits count against which devices, so that the limits in use of all tenants fit on each device.

A limit counts on a device from the tenant's first use of that device on: most tenants of a host with several devices
use one. Where the tenant has one device, or its devices were named when it was started, the limit counts on all of
them from the first process on. Inside a group that has a limit only the group counts.

Owns: what each tenant is granted and denied on each device, and the sums. Never: writes a limit (`enforcer` does) or
asks which process uses what. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from fgpu_ebpf import pages
from fgpu_ebpf.policy import Device
from fgpu_ebpf.quantities import memory_text
from fgpu_ebpf.tenant_tree import TenantTree, below
from fgpu_ebpf.tenants import Tenant

T = TypeVar("T")
Saved = tuple[dict[int, Mapping[int, int]], dict[int, Mapping[int, str]], set[int]]


class Commitments:
    """`overcommit`: limits may sum past a device. `held_elsewhere`: bytes of a device that tenants left behind."""

    def __init__(self, tree: TenantTree, devices: Sequence[Device], overcommit: bool) -> None:
        self._tree = tree
        self._capacity = {device.index: device.usable_bytes for device in devices}
        self.overcommit = overcommit
        self.held_elsewhere: Callable[[int], int] = lambda _: 0
        # By cgroup and device: bytes, and why not. What is inside is replaced, never changed: save() takes no copies.
        self._granted: dict[int, Mapping[int, int]] = {}
        self._denied: dict[int, Mapping[int, str]] = {}
        self._lacking: set[int] = set()  # cgroups that were denied something, or have less than they asked for
        self._sums: dict[int, int] | None = None  # committed bytes by device, while known

    def add_device(self, device: Device) -> None:
        """Limits can count on this one too from now on."""
        self._capacity[device.index] = device.usable_bytes
        self._sums = None

    def adopt(self, tenant: Tenant, devices: Iterable[int]) -> None:
        """Enters what was decided before this start: a limit of 0 was denied."""
        for index in devices:
            if tenant.limits[index]:
                _enter(self._granted, tenant.cgroup, index, tenant.limits[index])
            else:
                self._deny(tenant.cgroup, index, "there was no room for it when the agent ended")
        self._sums = None

    def forget(self, cgroup: int) -> None:
        """The cgroup is no tenant any more."""
        self._granted.pop(cgroup, None)
        self._denied.pop(cgroup, None)
        self._lacking.discard(cgroup)
        self._sums = None

    def save(self) -> Saved:
        """All of it, for restore()."""
        return dict(self._granted), dict(self._denied), set(self._lacking)

    def restore(self, saved: Saved) -> None:
        """As it was."""
        self._granted, self._denied, self._lacking = saved
        self._sums = None

    # -- which limit counts where

    def unit(self, tenant: Tenant) -> Tenant | None:
        """The outermost level with a limit that counts: the tenant itself, or a group; None: it has no limit."""
        levels = [tenant, *self._tree.around(tenant)]
        return next((level for level in reversed(levels) if counts(level)), None)

    def _is_inside(self, tenant: Tenant) -> bool:
        """A group around it has a limit that counts."""
        return any(counts(group) for group in self._tree.around(tenant))

    def granted_inside(self, group: Tenant) -> set[int]:
        """Devices on which tenants inside a group count, each for itself."""
        if not self._tree.has_inside(group.path):
            return set()
        inside = below(group.path)
        return {i for cgroup, found in self._granted.items() if self._path(cgroup).startswith(inside) for i in found}

    def is_used(self, cgroup: int) -> bool:
        """Its limit counts on some device, or was denied there."""
        return cgroup in self._granted or cgroup in self._denied

    def undecided(self, tenant: Tenant) -> set[int]:
        """Devices of a limit on which it was neither granted nor denied yet."""
        granted, denied = self._granted.get(tenant.cgroup, {}), self._denied.get(tenant.cgroup, {})
        return {i for i, limit in tenant.limits.items() if _is_limit(limit) and i not in granted and i not in denied}

    def uncommitted(self, tenant: Tenant) -> set[int]:
        """Devices of which the kernel gives a tenant nothing before it has told of the first use."""
        if self.overcommit or self.unit(tenant) is not tenant:
            return set()
        return {index for index in self.undecided(tenant) if tenant.limits[index]}

    def in_force(self, tenant: Tenant) -> dict[int, int]:
        """Bytes by device: what it asked for; 0 where it was denied; what it had where it grew and there is no room."""
        granted, denied = self._granted.get(tenant.cgroup, {}), self._denied.get(tenant.cgroup, {})
        return {i: 0 if i in denied else granted.get(i, limit) for i, limit in tenant.limits.items()}

    # -- decisions

    def commit(self, tenant: Tenant, devices: Iterable[int]) -> str:
        """Lets the limit count on these devices where it does not yet; returns why it cannot on the first, or empty."""
        new = sorted(self.undecided(tenant).intersection(devices))
        for index in new:
            self._grant(tenant, index)
        denied = self._denied.get(tenant.cgroup, {})
        return next((denied[index] for index in new if index in denied), "")

    def renew(self, tenant: Tenant) -> None:
        """Its limits have changed, or a group around it: what counts is granted anew, as far as there is room."""
        if self._is_inside(tenant):
            self.forget(tenant.cgroup)
        if not self.is_used(tenant.cgroup):
            return
        for index in set(range(pages.DEVICES)) - tenant.limits.keys():
            _remove(self._granted, tenant.cgroup, index)
            _remove(self._denied, tenant.cgroup, index)
        self._sums = None
        decided = tenant.limits.keys() - self.undecided(tenant)
        for index in decided if counts_by_device(tenant) else tenant.limits:
            self._grant(tenant, index)

    def try_again(self) -> list[Tenant]:
        """There may be room for tenants that were denied, or that grew in vain; returns those that got more."""
        more = []
        for cgroup in sorted(self._lacking):
            tenant = self._tree.get(cgroup)
            if tenant is None:
                continue
            before = self.in_force(tenant)
            for index in [*self._denied.get(cgroup, ()), *self._short(tenant)]:
                if tenant.limits[index]:  # 0: as it was pinned, until it is known what is wanted
                    self._grant(tenant, index)
            if cgroup not in self._denied and not self._short(tenant):
                self._lacking.discard(cgroup)
            if self.in_force(tenant) != before:
                more.append(tenant)
        return more

    def _short(self, tenant: Tenant) -> list[int]:
        granted = self._granted.get(tenant.cgroup, {})
        return [index for index, bytes_ in granted.items() if bytes_ != tenant.limits.get(index)]

    def _grant(self, tenant: Tenant, index: int) -> None:
        had, limit = self._granted.get(tenant.cgroup, {}).get(index), tenant.limits[index]
        lack = self._lack_on(tenant, index)
        if lack and not had:
            self._deny(tenant.cgroup, index, lack)
            _remove(self._granted, tenant.cgroup, index)
            return
        granted = min(limit, had) if lack and had else limit
        _enter(self._granted, tenant.cgroup, index, granted)
        _remove(self._denied, tenant.cgroup, index)
        if granted != limit:
            self._lacking.add(tenant.cgroup)
        if had is not None or self._tree.has_inside(tenant.path):
            self._sums = None
        elif self._sums is not None:
            self._sums[index] = self._sums.get(index, 0) + self._promise(tenant.cgroup, index)

    def _deny(self, cgroup: int, index: int, reason: str) -> None:
        _enter(self._denied, cgroup, index, reason)
        self._lacking.add(cgroup)

    # -- room

    def lack(self, tenant: Tenant) -> str:
        """Why a limit that is set by hand does not fit; empty: it does.

        On each device where it counts already, or is to count from the start; else on one at least.
        """
        if not counts_by_device(tenant):
            return next(filter(None, (self._lack_on(tenant, index) for index in tenant.limits)), "")
        decided = tenant.limits.keys() - self.undecided(tenant)
        lacks = [self._lack_on(tenant, index) for index in decided or tenant.limits]
        return next(filter(None, lacks), "") if decided or all(lacks) else ""

    def _lack_on(self, tenant: Tenant, index: int) -> str:
        """Why its limit does not fit on this device; empty: it does."""
        if self.overcommit or not counts(tenant) or self._is_inside(tenant):
            return ""
        others = self.committed(index, tenant) + self.held_elsewhere(index)
        limit, capacity = tenant.limits[index], self._capacity.get(index, 0)
        if not _is_limit(limit) or others + min(limit, capacity) <= capacity:
            return ""
        return (
            f"{memory_text(limit)} for {tenant.name} do not fit on device {index}: {memory_text(others)} of "
            f"{memory_text(capacity)} are committed to others; lower a limit, or allow overcommit"
        )

    def committed(self, index: int, but: Tenant | None = None) -> int:
        """Bytes of a device that are promised: where a group has a limit, its own and not those inside it."""
        if but and self._tree.has_inside(but.path):
            inside = below(but.path)
            others = (c for c in self._granted if not below(self._path(c)).startswith(inside))
            return sum(self._promise(cgroup, index) for cgroup in others)
        if self._sums is None:
            self._sums = {i: sum(self._promise(cgroup, i) for cgroup in self._granted) for i in self._capacity}
        own = self._promise(but.cgroup, index) if but and but.cgroup in self._granted else 0
        return self._sums.get(index, 0) - own

    def _path(self, cgroup: int) -> str:
        tenant = self._tree.get(cgroup)
        return tenant.path if tenant else ""

    def _promise(self, cgroup: int, index: int) -> int:
        """What counts of what one is granted: nothing inside a group that has a limit itself."""
        limit, tenant = self._granted[cgroup].get(index, 0), self._tree.get(cgroup)
        if tenant is None or not _is_limit(limit) or self._is_inside(tenant):
            return 0
        return min(limit, self._capacity.get(index, 0))

    def denied(self, tenant: Tenant) -> str:
        """Why it gets nothing of some device although it is to have a limit there; empty: it lacks none."""
        found = self._denied.get(tenant.cgroup, {})
        return "; ".join(self._lack_on(tenant, index) or reason for index, reason in found.items())


def counts(tenant: Tenant) -> bool:
    """Its limit is a promise: not where it only observes, or has none."""
    return not tenant.observe and any(map(_is_limit, tenant.limits.values()))


def counts_by_device(tenant: Tenant) -> bool:
    """Its limit counts on each device from the first use of that one."""
    limited: Mapping[int, int] = {i: limit for i, limit in tenant.limits.items() if _is_limit(limit)}
    return counts(tenant) and len(limited) > 1 and not tenant.named_devices


def _is_limit(limit: int) -> bool:
    return limit != pages.NO_LIMIT


def _enter(found: dict[int, Mapping[int, T]], cgroup: int, index: int, value: T) -> None:
    found[cgroup] = {**found.get(cgroup, {}), index: value}


def _remove(found: dict[int, Mapping[int, T]], cgroup: int, index: int) -> None:
    left = {i: value for i, value in found.get(cgroup, {}).items() if i != index}
    if left:
        found[cgroup] = left
    else:
        found.pop(cgroup, None)
