"""The limits that count against each device, so that their sum does not exceed the device's memory.

A limit counts on a device from the tenant's first use of that device on, because most tenants of a host with several
devices use a single device. If the tenant has one device, or the tenant's devices were named at its start, the limit
counts on all these devices from the tenant's first process on. Inside a group with a limit, only the group's limit
counts.

The module runs in the agent's main loop, does no I/O, and determines which limits count. `enforcer` writes the limits
to the kernel, and reads which process uses which device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from fgpu_ebpf import abi
from fgpu_ebpf.policy.rules import Device
from fgpu_ebpf.policy.units import memory_text
from fgpu_ebpf.tenancy.tenant import Source, Tenant
from fgpu_ebpf.tenancy.tenant_tree import TenantTree, below

T = TypeVar("T")
Saved = tuple[dict[int, Mapping[int, int]], dict[int, Mapping[int, str]], set[int]]


class Commitments:
    """The grants and denials of each tenant on each device, and the sum of the grants of each device.

    `overcommit`: the sum of limits may exceed a device's memory. `held_elsewhere`: a function that returns the bytes of
    a device that are still charged to tenants whose cgroup is gone, without the bytes in limits that count. Its second
    argument returns whether the limit of a cgroup counts on the device.
    """

    def __init__(self, tree: TenantTree, devices: Sequence[Device], overcommit: bool) -> None:
        self._tree = tree
        self._capacity = {device.index: device.usable_bytes for device in devices}
        self.overcommit = overcommit
        self.held_elsewhere: Callable[[int, Callable[[int], bool]], int] = lambda *_: 0
        # By cgroup and device with a limit: granted bytes, or the reason of a denial. An inner map is replaced and not
        # changed, so that save() need not copy inner maps.
        self._granted: dict[int, Mapping[int, int]] = {}
        self._denied: dict[int, Mapping[int, str]] = {}
        self._lacking: set[int] = set()  # cgroups that were denied a limit, or have less than they requested
        self._sums: dict[int, int] | None = None  # committed bytes by device; None if the sums must be computed again

    def add_device(self, device: Device) -> None:
        """Add a device on which limits count."""
        self._capacity[device.index] = device.usable_bytes
        self._sums = None

    def adopt(self, tenant: Tenant, devices: Iterable[int]) -> None:
        """Enter the decisions of an earlier agent about a tenant whose limit counts.

        A pinned limit of 0 was denied, or the policy's limit is 0, which the next decision finds.
        """
        for index in devices if counts(tenant) else ():
            limit = tenant.limits[index]
            if not limit:
                self._deny(tenant.cgroup, index, "the limit did not fit when the previous agent ended")
            elif _is_limit(limit):
                _enter(self._granted, tenant.cgroup, index, limit)
        self._sums = None

    def forget(self, cgroup: int) -> None:
        """Remove a cgroup that is no longer a tenant."""
        self._granted.pop(cgroup, None)
        self._denied.pop(cgroup, None)
        self._lacking.discard(cgroup)
        self._sums = None

    def save(self) -> Saved:
        """Return the whole state, for restore()."""
        return dict(self._granted), dict(self._denied), set(self._lacking)

    def restore(self, saved: Saved) -> None:
        """Restore the state that save() returned."""
        self._granted, self._denied, self._lacking = saved
        self._sums = None

    # -- the devices on which limits count

    def unit(self, tenant: Tenant) -> Tenant | None:
        """Return the outermost level whose limit counts (the tenant or a group), or None if no level has a limit."""
        levels = [tenant, *self._tree.around(tenant)]
        return next((level for level in reversed(levels) if counts(level)), None)

    def _is_inside(self, tenant: Tenant) -> bool:
        """Return True if a group around the tenant has a limit that counts."""
        return any(counts(group) for group in self._tree.around(tenant))

    def granted_inside(self, group: Tenant) -> dict[int, int]:
        """Return the bytes that tenants inside a group have been granted, by device."""
        total: dict[int, int] = {}
        inside = below(group.path)
        for cgroup, found in self._granted.items() if self._tree.has_inside(group.path) else ():
            for index, bytes_ in found.items() if self._path(cgroup).startswith(inside) else ():
                total[index] = total.get(index, 0) + bytes_
        return total

    def is_used(self, cgroup: int) -> bool:
        """Return True if the cgroup's limit was granted or denied on at least one device."""
        return cgroup in self._granted or cgroup in self._denied

    def undecided(self, tenant: Tenant) -> set[int]:
        """Return the devices on which the tenant's limit was neither granted nor denied."""
        granted, denied = self._granted.get(tenant.cgroup, {}), self._denied.get(tenant.cgroup, {})
        return {i for i, limit in tenant.limits.items() if _is_limit(limit) and i not in granted and i not in denied}

    def uncommitted(self, tenant: Tenant) -> set[int]:
        """Return the devices on which the kernel reports the tenant's first use before the admission of a request."""
        if self.overcommit or self.unit(tenant) is not tenant:
            return set()
        return {index for index in self.undecided(tenant) if tenant.limits[index]}

    def in_force(self, tenant: Tenant) -> dict[int, int]:
        """Return the limit in force by device, in bytes.

        The limit is 0 on a device where the limit was denied, and the earlier limit where an increase does not fit.
        """
        granted, denied = self._granted.get(tenant.cgroup, {}), self._denied.get(tenant.cgroup, {})
        return {i: 0 if i in denied else granted.get(i, limit) for i, limit in tenant.limits.items()}

    # -- decisions

    def commit(self, tenant: Tenant, devices: Iterable[int]) -> str:
        """Grant or deny the limit on each of these devices where the limit was neither granted nor denied.

        Returns:
            Why the limit does not fit on one of the devices, or an empty text if the limit fits on all devices.
        """
        new = sorted(self.undecided(tenant).intersection(devices))
        for index in new:
            self._grant(tenant, index)
        denied = self._denied.get(tenant.cgroup, {})
        return next((denied[index] for index in new if index in denied), "")

    def renew(self, tenant: Tenant) -> None:
        """Grant a tenant's fitting limits again, after a change of the tenant or of a surrounding group.

        If the tenant's own limit does not count, the tenant has no grants and no denials.
        """
        if not self.is_used(tenant.cgroup):
            return
        if self.unit(tenant) is not tenant:
            self.forget(tenant.cgroup)
            return
        limited = {index for index, limit in tenant.limits.items() if _is_limit(limit)}
        for index in set(range(abi.DEVICES)) - limited:
            _remove(self._granted, tenant.cgroup, index)
            _remove(self._denied, tenant.cgroup, index)
        self._sums = None
        for index in limited - self.undecided(tenant) if counts_by_device(tenant) else limited:
            self._grant(tenant, index)

    def try_again(self) -> list[Tenant]:
        """Try to grant denied limits, because capacity may have been freed. Return the tenants that got more."""
        more = []
        for cgroup in sorted(self._lacking):
            tenant = self._tree.get(cgroup)
            if tenant is None:
                continue
            before = self.in_force(tenant)
            for index in [*self._denied.get(cgroup, ()), *self._short(tenant)]:
                if tenant.limits[index]:  # a limit of 0 was denied by an earlier agent and is not determined yet
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
        shortage = self.shortage_on(tenant, index)
        if shortage and not had:  # a group that is found after its tenants has at least the tenants' grants
            had = self.granted_inside(tenant).get(index)
        if shortage and tenant.workload.booking:  # its scheduler also counts the driver's own memory
            left = self._capacity.get(index, 0) - self.committed(index, tenant) - self._held(index)
            had = max(had or 0, left)
        if shortage and not had:
            self._deny(tenant.cgroup, index, shortage)
            _remove(self._granted, tenant.cgroup, index)
            return
        granted = min(limit, had) if shortage and had else limit
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

    def shortage(self, tenant: Tenant) -> str:
        """Return why a limit that is set by hand does not fit, or an empty text if the limit fits.

        The limit must fit on every device where the limit was granted or denied, or counts from the first process on.
        If there is no such device, the limit must fit on at least one device. A limit that is granted already fits.
        """
        decided = tenant.limits.keys() - self.undecided(tenant) if counts_by_device(tenant) else tenant.limits.keys()
        new = [index for index in decided or tenant.limits if not self._has(tenant, index)]
        shortages = [self.shortage_on(tenant, index) for index in new]
        return next(filter(None, shortages), "") if decided or all(shortages) else ""

    def _has(self, tenant: Tenant, index: int) -> bool:
        """Return True if a limit is granted already, and the present tenant was not kept at the start with this limit.

        A limit that was kept because it does not fit stays reported until it is lowered or fits.
        """
        limit, before = tenant.limits[index], self._tree.get(tenant.cgroup)
        had = self._granted.get(tenant.cgroup, {}).get(index, -1)
        return limit < had or (limit == had and before is not None and before.source is not Source.KEPT)

    def shortage_on(self, tenant: Tenant, index: int) -> str:
        """Return why the tenant's limit does not fit on a device, or an empty text if the limit fits."""
        if self.overcommit or not counts(tenant) or self._is_inside(tenant):
            return ""
        others = self.committed(index, tenant) + self._held(index)
        limit, capacity = tenant.limits[index], self._capacity.get(index, 0)
        if limit in (0, abi.NO_LIMIT) or others + min(limit, capacity) <= capacity:
            return ""
        other = "name another device (`--device`, `devices:` in a policy), " if len(self._capacity) > 1 else ""
        outside = tenant.outside.get(index)
        contexts = f" (of which {memory_text(outside)} are for contexts, besides the limit)" if outside else ""
        return (
            f"{memory_text(limit)}{contexts} for {tenant.name} do not fit on device {index}: {memory_text(others)} of "
            f"{memory_text(capacity)} are committed to other tenants; lower a limit, {other}or allow overcommit"
        )

    def committed(self, index: int, but: Tenant | None = None) -> int:
        """Return the committed bytes of a device, without the bytes of `but` and of tenants inside `but`.

        Inside a group with a limit, only the group's limit is added.
        """
        if but and self._tree.has_inside(but.path):
            inside = below(but.path)
            others = (c for c in self._granted if not below(self._path(c)).startswith(inside))
            return sum(self._promise(cgroup, index) for cgroup in others)
        if self._sums is None:
            self._sums = {i: sum(self._promise(cgroup, i) for cgroup in self._granted) for i in self._capacity}
        own = self._promise(but.cgroup, index) if but and but.cgroup in self._granted else 0
        return self._sums.get(index, 0) - own

    def _held(self, index: int) -> int:
        """Return the bytes of a device that are charged to gone tenants and are not part of a granted limit."""
        return self.held_elsewhere(index, lambda cgroup: self._granted.get(cgroup, {}).get(index, 0) != 0)

    def _path(self, cgroup: int) -> str:
        tenant = self._tree.get(cgroup)
        return tenant.path if tenant else ""

    def _promise(self, cgroup: int, index: int) -> int:
        """Return a tenant's granted bytes that count on a device, or 0 if a group around the tenant has a grant."""
        limit, tenant = self._granted[cgroup].get(index, 0), self._tree.get(cgroup)
        if tenant is None:
            return 0
        if any(counts(group) and index in self._granted.get(group.cgroup, ()) for group in self._tree.around(tenant)):
            return 0
        return min(limit, self._capacity.get(index, 0))

    def denied(self, tenant: Tenant) -> str:
        """Return why the tenant's limit was denied on devices, or an empty text if the limit was not denied."""
        found = self._denied.get(tenant.cgroup, {})
        return "; ".join(self.shortage_on(tenant, index) or reason for index, reason in found.items())

    def partly(self, tenant: Tenant) -> Iterator[str]:
        """Yield why the tenant has less than its limit, for each device on which the tenant has a part of the limit."""
        for index in self._short(tenant):
            if why := self.shortage_on(tenant, index):
                yield f"{memory_text(self._granted[tenant.cgroup][index])} of device {index} are in force: {why}"


def counts(tenant: Tenant) -> bool:
    """Return True if the tenant has a limit and its mode is not `observe`, so that the limit counts against devices."""
    return not tenant.observe and any(map(_is_limit, tenant.limits.values()))


def counts_by_device(tenant: Tenant) -> bool:
    """Return True if the limit counts on each device separately, from the first use of that device on."""
    limited: Mapping[int, int] = {i: limit for i, limit in tenant.limits.items() if _is_limit(limit)}
    return counts(tenant) and len(limited) > 1 and not tenant.named_devices


def _is_limit(limit: int) -> bool:
    return limit != abi.NO_LIMIT


def _enter(found: dict[int, Mapping[int, T]], cgroup: int, index: int, value: T) -> None:
    found[cgroup] = {**found.get(cgroup, {}), index: value}


def _remove(found: dict[int, Mapping[int, T]], cgroup: int, index: int) -> None:
    left = {i: value for i, value in found.get(cgroup, {}).items() if i != index}
    if left:
        found[cgroup] = left
    else:
        found.pop(cgroup, None)
