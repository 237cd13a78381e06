"""Tenants whose cgroup was removed while a device may still hold the tenants' memory.

For example, another process may have a descriptor of the memory. The usage pages of these tenants stay in the kernel
until the last orphan is released, so that the bytes remain charged. The module runs in the agent's main loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.tenancy.tenant import Source, Tenant
from fgpu_ebpf.tenancy.tenant_names import TenantNames
from fgpu_ebpf.workloads.workload import Workload

FRESH_SECONDS = 5.0  # the driver frees the memory of an exited process within this time


class _Gone(NamedTuple):
    """A gone tenant, the monotonic time of the removal, and the outer levels that are charged for all its orphans."""

    tenant: Tenant
    since: float
    around: frozenset[int]


class GoneTenants:
    """The tenants whose cgroup no longer exists and that have orphans, by cgroup id.

    The name of a gone tenant contains the cgroup id, because a new tenant may have the gone tenant's former name.
    Iteration leaves out tenants without orphans. release_freed() removes these tenants.
    """

    def __init__(self, ledger: Ledger, names: TenantNames | None = None) -> None:
        self._ledger = ledger
        self._names = names or TenantNames()
        self._tenants: dict[int, _Gone] = {}

    def __iter__(self) -> Iterator[Tenant]:
        found = [gone.tenant for gone in self._tenants.values()]
        return iter([t for t in found if any(self._ledger.orphans.of_level(t.cgroup))])

    def keep(self, tenants: Iterable[Tenant]) -> set[int]:
        """Keep the tenants in `tenants` that have orphans, and return the ids of their cgroups."""
        now, held = time.monotonic(), [t for t in tenants if any(self._ledger.orphans.of_level(t.cgroup))]
        orphans = self._ledger.orphans.entries() if held else []
        for tenant in held:
            self._tenants[tenant.cgroup] = _Gone(self._names.outlive(tenant), now, _around(tenant.cgroup, orphans))
        return {tenant.cgroup for tenant in held}

    def release_freed(self) -> None:
        """Remove the tenants without memory on any device.

        Levels of parked processes stay until these processes run.
        """
        free = [cgroup for cgroup in self._tenants if not any(self._ledger.orphans.of_level(cgroup))]
        held = {entry.level for entry in self._ledger.parked.entries().values()} if free else ()
        self.forget([cgroup for cgroup in free if cgroup not in held])

    def forget(self, cgroups: Collection[int]) -> None:
        """Remove these tenants and their pages."""
        known = [cgroup for cgroup in cgroups if self._tenants.pop(cgroup, None)]
        if known:
            self._ledger.remove(known)
            self._names.forget(known)

    def held_bytes(self, index: int, is_committed: Callable[[int], bool]) -> int:
        """Return the bytes of a device that gone tenants have held for more than FRESH_SECONDS.

        Bytes that several levels are charged for count once. Bytes that are part of a limit that counts on the device
        do not count again. `is_committed` returns whether the limit of a cgroup counts there.
        """
        until = time.monotonic() - FRESH_SECONDS
        old = {cgroup: gone.around for cgroup, gone in self._tenants.items() if gone.since < until}
        outermost = [c for c, around in old.items() if not any(level in old or is_committed(level) for level in around)]
        return sum(found[index] for cgroup in outermost if (found := self._ledger.orphans.of_level(cgroup)))


def _around(cgroup: int, orphans: Iterable[Orphan]) -> frozenset[int]:
    """Return the levels around a cgroup that are charged for all orphans of the cgroup."""
    found = [frozenset(o.levels[o.levels.index(cgroup) + 1 :]) for o in orphans if cgroup in o.levels]
    return frozenset.intersection(*found) if found else frozenset()


def left_behind(cgroup: int) -> Tenant:
    """Return a tenant for a pinned page of a removed cgroup. The agent has no other record of the cgroup."""
    workload = Workload(path="", cgroup=cgroup, name="gone")
    return Tenant(workload, workload.name, Source.POLICY, "", {})
