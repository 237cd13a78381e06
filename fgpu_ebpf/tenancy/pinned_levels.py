"""The takeover of the pinned levels at the agent's start.

In the first step, every level of an existing cgroup is entered with its pinned limits. In the second step, policies and
overrides are put in force. In the last step, levels that neither a policy nor an override requests are released. If the
agent cannot establish whether a level is requested, the level keeps its limits as a tenant of source `kept`, and
doubts() reports the tenant. A pod without a limit stays without a limit while the claims of the pod are unknown. The
module runs in the agent's main thread.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.process_entry import levels_of
from fgpu_ebpf.scheduling.fair_queue import Share
from fgpu_ebpf.tenancy.gone_tenants import GoneTenants, left_behind
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.tenant import Source, Tenant, kept_tenant

log = logging.getLogger("fgpu.agent")
MOST_NAMED = 3


def take_up(ledger: Ledger, manager: Manager, gone: GoneTenants) -> None:
    """Enter the pinned levels, apply policies and overrides, and release the levels that none of these requests.

    Overrides of removed cgroups are dropped.
    """
    workloads, enforcer = manager.workloads, manager.enforcer
    alive = {cgroup: path for path in ("/", *workloads.walk()) if (cgroup := workloads.cgroup(path)) is not None}
    used = _used(ledger)
    for tenant, uncommitted in _pinned(ledger, manager, alive):
        enforcer.adopt(tenant, tenant.limits.keys() - uncommitted if tenant.cgroup in used else ())
    manager.remove_all_empty()
    manager.consider_all()
    manager.settle()
    manager.overrides.drop([o.cgroup for o in manager.overrides if workloads.cgroup(o.path) != o.cgroup])
    for path in alive.values():
        workload = workloads.identify(path)
        for inside in enforcer.answered.kept_free(workload, workloads) if workload and workload.is_pod else ():
            if not enforcer.levels(inside):
                enforcer.answer(inside)  # so that the next start has the decision too
    known = {tenant.cgroup for tenant in enforcer}
    unknown = [cgroup for cgroup in ledger.tenants() if cgroup not in known]
    enforcer.release(unknown, gone.keep(left_behind(c) for c in unknown if c not in alive))
    manager.consider([tenant.path for tenant in _kept(enforcer)])  # the release may have made room for kept limits
    for tenant in _kept(enforcer):
        log.error("%s keeps its limits from before the start: %s", tenant.name, "; ".join(tenant.notes))


def _pinned(ledger: Ledger, manager: Manager, alive: dict[int, str]) -> Iterator[tuple[Tenant, set[int]]]:
    """Yield each pinned level of an existing cgroup and the devices where the limit does not count, by age."""
    limits: dict[int, dict[int, int]] = defaultdict(dict)
    uncommitted: dict[int, set[int]] = defaultdict(set)
    flags: dict[int, dict[int, int]] = defaultdict(dict)
    for cgroup, device, bytes_, said in ledger.limits():
        limits[cgroup][device], flags[cgroup][device] = bytes_, said
        if said & abi.uncommitted(device):
            uncommitted[cgroup].add(device)
    shares: dict[int, Share] = {cgroup: share for (cgroup, _), share in ledger.times.shares().items()}
    for cgroup in sorted(ledger.tenants()):
        path = alive.get(cgroup)
        workload = manager.workloads.identify(path) if path is not None else None
        if workload and workload.cgroup == cgroup:
            tenant = kept_tenant(workload, limits.get(cgroup, {}), flags.get(cgroup, {}), shares.get(cgroup))
            yield tenant, uncommitted.get(cgroup, set())


def _used(ledger: Ledger) -> set[int]:
    """Return the levels in which a process has registered or is charged. The limits of these levels count."""
    used = levels_of(ledger.processes())
    for cgroup in ledger.tenants():
        if ledger.resolved(cgroup) or any(usage.used or usage.parked for usage in ledger.usage(cgroup) or ()):
            used.add(cgroup)
    return used


def _kept(tenants: Iterable[Tenant]) -> list[Tenant]:
    return [tenant for tenant in tenants if tenant.source is Source.KEPT]


def doubts(trouble: str, tenants: Iterable[Tenant]) -> str:
    """Return why the requested limits may not be in force, or an empty text.

    Args:
        trouble: the error in the policies, or an empty text without an error.
        tenants: all tenants.
    """
    kept = _kept(tenants)
    said = [f"{tenant.name}: {'; '.join(tenant.notes)}" for tenant in kept[:MOST_NAMED]]
    more = f" and {len(kept) - MOST_NAMED} more" if len(kept) > MOST_NAMED else ""
    keeps = [f"limits from before the start are kept: {', '.join(said)}{more}"] if kept else []
    return "; ".join([*([trouble] if trouble else []), *keeps])
