"""Tenants whose cgroup was removed while a device may still hold the tenants' memory.

For example, another process may have a descriptor of the memory. The usage pages of these tenants stay in the kernel
until the last orphan is released, so that the bytes remain charged. The module runs in the agent's main loop.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator

from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.tenancy.tenant import Source, Tenant
from fgpu_ebpf.tenancy.tenant_names import TenantNames
from fgpu_ebpf.workloads.workload import Workload

FRESH_SECONDS = 5.0  # the driver frees the memory of an exited process within this time


class GoneTenants:
    """The tenants whose cgroup no longer exists and that have orphans, by cgroup id.

    The name of a gone tenant contains the cgroup id, because a new tenant may have the gone tenant's former name.
    Iteration leaves out tenants without orphans. release_freed() removes these tenants.
    """

    def __init__(self, ledger: Ledger, names: TenantNames | None = None) -> None:
        self._ledger = ledger
        self._names = names or TenantNames()
        self._tenants: dict[int, tuple[Tenant, float]] = {}  # with the monotonic time of the removal

    def __iter__(self) -> Iterator[Tenant]:
        return iter([t for t, _ in self._tenants.values() if any(self._ledger.orphans.of_level(t.cgroup))])

    def keep(self, tenants: Iterable[Tenant]) -> set[int]:
        """Keep the tenants in `tenants` that have orphans, and return the ids of their cgroups."""
        now, held = time.monotonic(), [t for t in tenants if any(self._ledger.orphans.of_level(t.cgroup))]
        for tenant in held:
            self._tenants[tenant.cgroup] = self._names.outlive(tenant), now
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

    def held_bytes(self, index: int) -> int:
        """Return the bytes of a device that gone tenants have held for more than FRESH_SECONDS."""
        until = time.monotonic() - FRESH_SECONDS
        old = [cgroup for cgroup, (_, since) in self._tenants.items() if since < until]
        return sum(found[index] for cgroup in old if (found := self._ledger.orphans.of_level(cgroup)))


def left_behind(cgroup: int) -> Tenant:
    """Return a tenant for a pinned page of a removed cgroup. The agent has no other record of the cgroup."""
    workload = Workload(path="", cgroup=cgroup, name="gone")
    return Tenant(workload, workload.name, Source.POLICY, "", {})
