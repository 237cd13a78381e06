"""Tenants whose cgroup is gone while a device still holds memory of theirs, in descriptors that other processes have.

Their usage pages stay in the kernel, so that the bytes remain charged to them, until the last orphan is released. The
manager uses this module, in the agent's main loop.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator

from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.tenancy.tenant import Source, Tenant
from fgpu_ebpf.tenancy.tenant_names import TenantNames
from fgpu_ebpf.workloads.workload import Workload

FRESH_SECONDS = 5.0  # the driver frees what an ended process held within this time, and so makes room for others


class GoneTenants:
    """Gone tenants by cgroup id. Each is named after its cgroup, since another tenant may have its name by now.

    Tenants without memory are not shown, and are removed soon.
    """

    def __init__(self, ledger: Ledger, names: TenantNames | None = None) -> None:
        self._ledger = ledger
        self._names = names or TenantNames()
        self._tenants: dict[int, tuple[Tenant, float]] = {}  # each with the monotonic time since which it is gone

    def __iter__(self) -> Iterator[Tenant]:
        return iter([t for t, _ in self._tenants.values() if any(self._ledger.orphans.of_level(t.cgroup))])

    def keep(self, tenants: Iterable[Tenant]) -> set[int]:
        """Keep those of these tenants that have orphaned bytes. Returns their cgroups."""
        now, held = time.monotonic(), [t for t in tenants if any(self._ledger.orphans.of_level(t.cgroup))]
        for tenant in held:
            self._tenants[tenant.cgroup] = self._names.outlive(tenant), now
        return {tenant.cgroup for tenant in held}

    def release_freed(self) -> None:
        """Remove tenants whose memory every device has released."""
        free = [cgroup for cgroup in self._tenants if not any(self._ledger.orphans.of_level(cgroup))]
        self.forget(free)

    def forget(self, cgroups: Collection[int]) -> None:
        """Remove these tenants and their pages."""
        known = [cgroup for cgroup in cgroups if self._tenants.pop(cgroup, None)]
        if known:
            self._ledger.remove(known)
            self._names.forget(known)

    def held_bytes(self, index: int) -> int:
        """Return the bytes of a device that are held for longer than the driver needs to end a process."""
        until = time.monotonic() - FRESH_SECONDS
        old = [cgroup for cgroup, (_, since) in self._tenants.items() if since < until]
        return sum(found[index] for cgroup in old if (found := self._ledger.orphans.of_level(cgroup)))


def left_behind(cgroup: int) -> Tenant:
    """Return a tenant for a pinned page whose cgroup no longer exists and of which this agent has no other record."""
    workload = Workload(path="", cgroup=cgroup, name="gone")
    return Tenant(workload, workload.name, Source.POLICY, "", {})
