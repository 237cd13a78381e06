"""Make a Snapshot from the ledger, the tenants and the last result of NVML.

This module runs in the agent's main loop. A number that NVML or the gatekeeper does not report is None.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fgpu_ebpf.agent import gatekeeper_process
from fgpu_ebpf.agent.bypasses import Bypasses
from fgpu_ebpf.agent.nvml_reconcile import STALE_SECONDS, Truth
from fgpu_ebpf.agent.parts import Parts
from fgpu_ebpf.driver.nvml import Device
from fgpu_ebpf.ledger import views
from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.policy.rules import Priority
from fgpu_ebpf.scheduling.fair_queue import MILLION
from fgpu_ebpf.snapshot import (
    ComputeView,
    DeviceView,
    OrphanView,
    ProcessView,
    Refusal,
    Snapshot,
    TenantDevice,
    TenantView,
    UnmanagedView,
    UsageView,
)
from fgpu_ebpf.tenancy.enforcement import enforcement
from fgpu_ebpf.tenancy.pinned_levels import doubts
from fgpu_ebpf.tenancy.tenant import Tenant

NS = 1e9


class _Look(NamedTuple):
    """The readings for one Snapshot.

    `processes`: by level, then by tgid. `refusals` and `turns`: by level and device. `unwitnessed`: by tgid and device.
    """

    parts: Parts
    devices: Sequence[Device]
    truth: Truth
    groups: set[int]
    processes: Mapping[int, Mapping[int, Process]]
    refusals: Mapping[tuple[int, int], Sequence[Refusal]]
    turns: Mapping[tuple[int, int], TurnCounts]
    now_ns: int
    unenforced: str
    unwitnessed: Mapping[tuple[int, int], int]
    bypasses: Bypasses


def take_snapshot(parts: Parts, run_dir: Path) -> Snapshot:
    """Take a Snapshot of the present state of all parts."""
    ledger, enforcer, truth = parts.ledger, parts.enforcer, parts.reconciler.truth
    discovery, reasons = parts.driver.discovery, parts.driver.reasons
    processes, counters = ledger.processes(), ledger.counters()
    orphaned = _orphaned(truth.orphans)
    reasons.forget_ended(processes)
    turns, gatekeeper = ledger.times.turns(), gatekeeper_process.counts(run_dir)
    unwitnessed = parts.chores.unwitnessed.find(processes, truth.orphans)
    bypasses = Bypasses(
        enforcer.preexisting, discovery.unprobed(), discovery.standalone(), {pid for pid, _ in unwitnessed},
        truth.turns, reasons,
    )  # fmt: skip
    look = _Look(
        parts, parts.driver.nvml.devices, truth, enforcer.groups(), _by_level(processes), views.refusals(counters),
        turns, time.monotonic_ns(), discovery.unenforced(), unwitnessed, bypasses,
    )  # fmt: skip
    return Snapshot(
        time_seconds=time.time(),
        taken_seconds=look.now_ns / NS,
        devices=tuple(_device(d, look, processes, gatekeeper, orphaned.get(d.index, 0)) for d in look.devices),
        tenants=tuple(_tenant(look, tenant) for tenant in [*enforcer, *parts.manager.gone]),
        anomalies=views.anomalies(counters) | {"unprobed": discovery.refusals},
        reconcile_failure=truth.failure,
        unenforced=look.unenforced,
        incomplete=doubts(parts.policies.trouble, enforcer),
        gatekeeper=gatekeeper,
        gatekeeper_up=gatekeeper_process.is_up(run_dir),
        events=views.events(counters),
        policies=parts.policies.view(),
        probe_hits=views.probe_hits(ledger),
        libraries=discovery.libraries(enforcer.name_at),
        maps=views.tables(ledger),
    )


def _by_level(processes: Mapping[int, Process]) -> Mapping[int, Mapping[int, Process]]:
    found: dict[int, dict[int, Process]] = defaultdict(dict)
    for tgid, process in processes.items():
        for level in process.levels:
            found[level][tgid] = process
    return found


def _tenant(look: _Look, tenant: Tenant) -> TenantView:
    own = look.processes.get(tenant.cgroup, {})
    how = {tgid: look.bypasses.how(tgid, p) for tgid, p in own.items()}
    why = {tgid: look.bypasses.why(tgid, p, how[tgid]) for tgid, p in own.items()}
    shown = tuple(
        ProcessView(
            tgid, d.index, p.bytes[d.index], how[tgid], why[tgid], look.bypasses.loader(tgid, p), p.parked[d.index]
        )
        for tgid, p in own.items()
        for d in look.devices
        if p.bytes[d.index] or p.parked[d.index]
    )
    bypassing = Counter(filter(None, how.values()))
    workload, (denied, would_deny) = tenant.workload, look.parts.ledger.opens.of(tenant.cgroup)
    return TenantView(
        tenant=tenant.name,
        kind=_kind(look, tenant),
        path=tenant.path,
        cgroup=tenant.cgroup,
        source=tenant.source,
        policy=tenant.policy,
        namespace=workload.namespace or "",
        pod=workload.pod or "",
        container=workload.container or "",
        enforcement=_enforcement(look, tenant, bypassing),
        denied=look.parts.enforcer.denied(tenant.cgroup),
        notes=tenant.notes,
        labels=tenant.metric_labels,
        bypassing=dict(bypassing),
        devices=tuple(_tenant_device(look, tenant, own, device) for device in look.devices),
        processes=shown,
        shimless=dict(Counter(filter(None, why.values()))),
        orphans=tuple(_orphan(look, orphan) for orphan in look.truth.orphans if tenant.cgroup in orphan.levels),
        opens_denied=denied,
        opens_would_deny=would_deny,
        parking=look.parts.chores.idle_parking.view(tenant),
    )


def _kind(look: _Look, tenant: Tenant) -> str:
    if look.parts.enforcer.get(tenant.cgroup) is None:
        return "gone"
    return "group" if tenant.cgroup in look.groups else "tenant"


def _orphaned(orphans: Iterable[Orphan]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for orphan in orphans:
        found[orphan.device] += orphan.bytes
    return dict(found)


def _orphan(look: _Look, orphan: Orphan) -> OrphanView:
    seconds = max(0.0, (look.now_ns - orphan.since_ns) / NS)
    keepers = look.parts.chores.keepers
    return OrphanView(
        orphan.tgid, orphan.device, orphan.bytes, seconds, bool(orphan.ended_ns), keepers.of(orphan.tgid),
        keepers.parents_of(orphan.tgid),
    )  # fmt: skip


def _enforcement(look: _Look, tenant: Tenant, bypassing: Iterable[str]) -> str:
    kills = tenant.kill and not look.parts.enforcer.spares(tenant)
    return enforcement(look.unenforced, tenant.observe, kills, bypassing)


def _tenant_device(look: _Look, tenant: Tenant, own: Iterable[int], device: Device) -> TenantDevice:
    (u,) = look.parts.ledger.usage(tenant.cgroup, (device.index,)) or (None,)
    refusals = tuple(look.refusals.get((tenant.cgroup, device.index), ()))
    compute, drift = _compute(look, tenant, device.index), _drift(look, own, device.index)
    numbers = (u.limit, u.used, u.peak, u.refused, u.admitted, u.witnessed) if u else (0,) * 6
    unwitnessed = sum(look.unwitnessed.get((tgid, device.index), 0) for tgid in own)
    orphaned = u.orphaned if u else 0
    usage = tuple(
        UsageView(source, of.run, of.byte_seconds, of.held, of.idle)
        for source, of in sorted(look.parts.chores.usage.totals.get((tenant.cgroup, device.index), {}).items())
    )
    return TenantDevice(
        device.index, *numbers, drift, refusals, compute, orphaned, unwitnessed, usage, u.parked if u else 0
    )


def _drift(look: _Look, own: Iterable[int], device: int) -> int | None:
    """Return the drift of a tenant, or None unless NVML recently showed each process of the tenant that has memory."""
    age = _age(look, device)
    known = [look.truth.drift.get((tgid, device)) for tgid in own]
    if not known or None in known or age is None or age > STALE_SECONDS:
        return None
    return sum(filter(None, known))


def _age(look: _Look, device: int) -> float | None:
    """Return the seconds since NVML last answered for a device, or None if NVML never answered."""
    at = look.truth.answered.get(device)
    return None if at is None else look.now_ns / NS - at


def _compute(look: _Look, tenant: Tenant, device: int) -> ComputeView | None:
    """Return the tenant's share of a device's time, and the time that the tenant had, or None if there is no share."""
    share = tenant.shares.get(device)
    if share is None:
        return None
    place = tenant.cgroup, device
    shortfall = look.parts.chores.shortfalls.found.get(place)
    t = look.turns.get(place) or TurnCounts()
    return ComputeView(
        share.limit_millionths / MILLION, share.weight, list(Priority)[share.rank].value, t.owned_ns / NS, t.waits,
        t.wait_ns / NS, t.throttled, t.overruns, bool(t.owner), t.had_millionths / MILLION,
        t.entitled_millionths / MILLION, bool(t.free), (look.now_ns - t.since_ns) / NS if t.since_ns else None,
        look.truth.turns.beyond.get(place), shortfall, t.free > 1,
    )  # fmt: skip


def _owner(look: _Look, device: int) -> str | None:
    owners = (look.parts.enforcer.get(level) for (level, index), t in look.turns.items() if index == device and t.owner)
    return next((tenant.name for tenant in owners if tenant), None)


def _device(
    device: Device, look: _Look, processes: Mapping[int, Process], gatekeeper: Mapping[str, Any], orphaned: int
) -> DeviceView:
    truth = look.truth
    held, ended = truth.held.get(device.index), truth.ended.get(device.index, {})
    outside = [
        UnmanagedView(pid, bytes_ if bytes_ is None else bytes_ - ended.get(pid, 0))
        for pid, bytes_ in (held or {}).items()
        if pid not in processes and (bytes_ is None or bytes_ > ended.get(pid, 0))
        and not procfs.ended(pid)  # the process may have ended since the query of NVML
    ]  # fmt: skip
    reported = truth.xids.get(device.index)
    xids: tuple[Mapping[int, int] | None, int, int | None] = (
        (reported.counts, reported.ignored, reported.fatal) if reported else (None, 0, None)
    )
    is_known = held is not None and all(process.bytes is not None for process in outside)
    unmanaged = sum(process.bytes or 0 for process in outside) if is_known else None
    return DeviceView(
        device.index, device.uuid_text, device.name, device.pci_bus_id, device.capacity_bytes,
        truth.used.get(device.index), look.parts.enforcer.commitments.committed(device.index), unmanaged,
        gatekeeper_process.slices(gatekeeper, device.index), _owner(look, device.index), _age(look, device.index),
        None if held is None else len(outside), *xids, orphaned, truth.unexplained.get(device.index),
        tuple(outside), device.usable_bytes,
        "concurrent" if device.index in look.parts.ledger.times.concurrent() else "turns",
    )  # fmt: skip
