"""Tenants whose cgroup is gone while the device still holds memory of theirs, in descriptors that other processes have.

Their usage pages stay in the kernel, so that the bytes are charged to them, until the last orphan is let go. Used by
the manager, in the agent's main loop.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator

from fgpu_ebpf.identity import Workload
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.tenant_names import TenantNames
from fgpu_ebpf.tenants import Source, Tenant

FRESH_SECONDS = 5.0  # the driver takes down what an ended process held: that soon makes room for others


class GoneTenants:
    """By cgroup id; each is named after its cgroup, since its name may be another tenant's by now. Those without memory
    are not shown, and forgotten soon.
    """

    def __init__(self, ledger: Ledger, names: TenantNames | None = None) -> None:
        self._ledger = ledger
        self._names = names or TenantNames()
        self._tenants: dict[int, tuple[Tenant, float]] = {}  # and since when it is gone

    def __iter__(self) -> Iterator[Tenant]:
        return iter([t for t, _ in self._tenants.values() if any(self._ledger.orphans.of_level(t.cgroup))])

    def keep(self, tenants: Iterable[Tenant]) -> set[int]:
        """Keeps those of these tenants that have orphaned bytes; returns their cgroups."""
        now, held = time.monotonic(), [t for t in tenants if any(self._ledger.orphans.of_level(t.cgroup))]
        for tenant in held:
            self._tenants[tenant.cgroup] = self._names.outlive(tenant), now
        return {tenant.cgroup for tenant in held}

    def tidy(self) -> None:
        """Forgets those whose memory the device does not hold any more."""
        free = [cgroup for cgroup in self._tenants if not any(self._ledger.orphans.of_level(cgroup))]
        self.forget(free)

    def forget(self, cgroups: Collection[int]) -> None:
        """Takes their pages away."""
        known = [cgroup for cgroup in cgroups if self._tenants.pop(cgroup, None)]
        if known:
            self._ledger.remove(known)
            self._names.forget(known)

    def held_bytes(self, index: int) -> int:
        """Bytes of a device that the device has held for longer than it takes to end a process."""
        until = time.monotonic() - FRESH_SECONDS
        old = [cgroup for cgroup, (_, since) in self._tenants.items() if since < until]
        return sum(found[index] for cgroup in old if (found := self._ledger.orphans.of_level(cgroup)))


def left_behind(cgroup: int) -> Tenant:
    """A tenant of which an earlier agent knew more: its cgroup is gone, its page is not."""
    workload = Workload(path="", cgroup=cgroup, name="gone")
    return Tenant(workload, workload.name, Source.POLICY, "", {})
