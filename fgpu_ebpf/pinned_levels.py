"""Taking up the levels that the kernel has pinned when the agent starts.

Owns: the order of a start: first every level of a cgroup that exists is entered as it is pinned, then policies and
overrides are put in force, then what nothing wants is released. Never: releases a level of which it is not known
whether something wants it: that keeps its limits, as a tenant of source `kept`, and `doubts` says so.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator

from fgpu_ebpf import pages
from fgpu_ebpf.gone_tenants import GoneTenants, left_behind
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.manager import Manager
from fgpu_ebpf.processes import levels_of
from fgpu_ebpf.scheduler import Share
from fgpu_ebpf.tenants import Source, Tenant, kept_tenant

log = logging.getLogger("fgpu.agent")
MOST_NAMED = 3


def take_up(ledger: Ledger, manager: Manager, gone: GoneTenants) -> None:
    """Brings kernel, policies and what was set by hand together."""
    workloads, enforcer = manager.workloads, manager.enforcer
    alive = {cgroup: path for path in ("/", *workloads.walk()) if (cgroup := workloads.cgroup(path)) is not None}
    used = _used(ledger)
    for tenant, uncommitted in _pinned(ledger, manager, alive):
        enforcer.adopt(tenant, tenant.limits.keys() - uncommitted if tenant.cgroup in used else ())
    manager.tidy_all()
    manager.consider_all()
    manager.settle()
    known = {tenant.cgroup for tenant in enforcer}
    unknown = [cgroup for cgroup in ledger.tenants() if cgroup not in known]
    enforcer.release(unknown, gone.keep(left_behind(c) for c in unknown if c not in alive))
    manager.consider([tenant.path for tenant in _kept(enforcer)])  # there may be room now
    for tenant in _kept(enforcer):
        log.error("%s keeps the limits that it had: %s", tenant.name, "; ".join(tenant.notes))


def _pinned(ledger: Ledger, manager: Manager, alive: dict[int, str]) -> Iterator[tuple[Tenant, set[int]]]:
    """Every pinned level of a cgroup that exists, as the kernel has it, the oldest first; and the devices on which its
    limit does not count yet.
    """
    limits: dict[int, dict[int, int]] = defaultdict(dict)
    uncommitted: dict[int, set[int]] = defaultdict(set)
    flags: dict[int, int] = {}
    for cgroup, device, bytes_, said in ledger.limits():
        limits[cgroup][device], flags[cgroup] = bytes_, said
        if said & pages.uncommitted(device):
            uncommitted[cgroup].add(device)
    shares: dict[int, Share] = {cgroup: share for (cgroup, _), share in ledger.times.shares().items()}
    for cgroup in sorted(ledger.tenants()):
        path = alive.get(cgroup)
        workload = manager.workloads.identify(path) if path is not None else None
        if workload and workload.cgroup == cgroup:
            tenant = kept_tenant(workload, limits.get(cgroup, {}), flags.get(cgroup, 0), shares.get(cgroup))
            yield tenant, uncommitted.get(cgroup, set())


def _used(ledger: Ledger) -> set[int]:
    """Levels that count: one of the processes in them has said hello, or is charged."""
    used = levels_of(ledger.processes())
    for cgroup in ledger.tenants():
        if ledger.resolved(cgroup) or any(usage.used for usage in ledger.usage(cgroup) or ()):
            used.add(cgroup)
    return used


def _kept(tenants: Iterable[Tenant]) -> list[Tenant]:
    return [tenant for tenant in tenants if tenant.source is Source.KEPT]


def doubts(trouble: str, tenants: Iterable[Tenant]) -> str:
    """Why it is not known that what was asked for is in force; empty: it is. `trouble`: of the policy files."""
    kept = _kept(tenants)
    said = [f"{tenant.name}: {'; '.join(tenant.notes)}" for tenant in kept[:MOST_NAMED]]
    more = f" and {len(kept) - MOST_NAMED} more" if len(kept) > MOST_NAMED else ""
    keeps = [f"limits from before the start are kept: {', '.join(said)}{more}"] if kept else []
    return "; ".join([*([trouble] if trouble else []), *keeps])
