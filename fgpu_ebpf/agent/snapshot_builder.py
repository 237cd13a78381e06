"""Makes a Snapshot from the ledger, the tenants and the last result of NVML.

Runs in the agent's main loop. Numbers of a part that is missing are left out.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpu_ebpf import abi
from fgpu_ebpf.agent import gatekeeper_process
from fgpu_ebpf.agent.nvml_reconcile import STALE_SECONDS, Truth
from fgpu_ebpf.agent.policy_reload import Policies
from fgpu_ebpf.driver.bypass_reason import Reasons
from fgpu_ebpf.driver.descriptor_holders import Keepers
from fgpu_ebpf.driver.discovery import Discovery
from fgpu_ebpf.driver.nvml import Device
from fgpu_ebpf.driver.xids import Reported
from fgpu_ebpf.ledger import resolutions
from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.ledger.ledger import Count, Ledger
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.owner_table import COUNTED
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.ledger.unwitnessed_memory import Unwitnessed
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.policy.rules import Priority
from fgpu_ebpf.scheduling.fair_queue import MILLION
from fgpu_ebpf.snapshot import (
    ComputeView,
    DeviceView,
    MapView,
    OrphanView,
    PoliciesView,
    ProcessView,
    Refusal,
    Shortfall,
    SlicesView,
    Snapshot,
    TenantDevice,
    TenantView,
)
from fgpu_ebpf.tenancy.enforcement import enforcement
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.level_capacity import PLACES
from fgpu_ebpf.tenancy.tenant import Tenant

NS = 1e9
_WITHOUT = ("no_admission", "no_shim", "unwitnessed")


@dataclass(frozen=True, slots=True)
class _Look:
    """Readings for one Snapshot, by level."""

    ledger: Ledger
    enforcer: Enforcer
    devices: Sequence[Device]
    truth: Truth
    groups: set[int]
    processes: Mapping[int, Mapping[int, Process]]
    refusals: Mapping[tuple[int, int], Sequence[Refusal]]
    turns: Mapping[tuple[int, int], TurnCounts]
    now_ns: int
    unprobed: Set[int]
    standalone: Set[int]
    unenforced: str
    reasons: Reasons
    unwitnessed: Mapping[tuple[int, int], int]
    keepers: Keepers
    shortfalls: Mapping[tuple[int, int], Shortfall]


def take_snapshot(
    ledger: Ledger, enforcer: Enforcer, devices: Sequence[Device], truth: Truth, run_dir: Path,
    policies: Policies | None, discovery: Discovery, reasons: Reasons, gone: Iterable[Tenant], unwitnessed: Unwitnessed,
    keepers: Keepers, shortfalls: Mapping[tuple[int, int], Shortfall],
) -> Snapshot:  # fmt: skip
    """Take a Snapshot."""
    processes, counters = ledger.processes(), ledger.counters()
    orphaned = _orphaned(truth.orphans)
    reasons.forget_ended(processes)
    turns, gatekeeper = ledger.times.turns(), _gatekeeper(run_dir)
    look = _Look(
        ledger, enforcer, devices, truth, enforcer.groups(), _by_level(processes), _by_place(counters), turns,
        time.monotonic_ns(), discovery.unprobed(), discovery.standalone(), discovery.unenforced(),
        reasons, unwitnessed.find(processes, truth.orphans), keepers, shortfalls,
    )  # fmt: skip
    anomalies = {a.name.lower(): _host_count(counters, abi.Kind.KINDS, a) for a in abi.Anomaly}
    return Snapshot(
        time_seconds=time.time(),
        taken_seconds=look.now_ns / NS,
        devices=tuple(_device(d, look, processes, gatekeeper, orphaned.get(d.index, 0)) for d in devices),
        tenants=tuple(_tenant(look, tenant) for tenant in [*enforcer, *gone]),
        anomalies=anomalies | {"unprobed": discovery.refusals},
        reconcile_failure=truth.failure,
        unenforced=look.unenforced,
        gatekeeper=gatekeeper,
        gatekeeper_up=gatekeeper_process.is_up(run_dir),
        events={fate.name.lower(): _host_count(counters, abi.Kind.EVENTS, fate) for fate in abi.Fate},
        policies=_policies(policies),
        probe_hits=_hits(ledger.hits()),
        maps=_maps(ledger),
    )


def _hits(counted: Sequence[int]) -> Mapping[str, int]:
    """Return the hits by the probe's name: of every probed driver function and of the shim's symbols."""
    named = {f.name.lower(): counted[f] for f in abi.Function if f is not abi.Function.NONE}
    return named | {"admit": counted[abi.HIT_ADMIT], "give_back": counted[abi.HIT_GIVE_BACK]}


def _by_level(processes: Mapping[int, Process]) -> Mapping[int, Mapping[int, Process]]:
    found: dict[int, dict[int, Process]] = defaultdict(dict)
    for tgid, process in processes.items():
        for level in process.levels:
            found[level][tgid] = process
    return found


def _by_place(counters: Mapping[Count, int]) -> Mapping[tuple[int, int], Sequence[Refusal]]:
    found: dict[tuple[int, int], list[Refusal]] = defaultdict(list)
    for c, n in counters.items():
        if c.cgroup:
            refusal = Refusal(abi.Kind(c.kind).name.lower(), abi.Reason(c.reason).name.lower(), n)
            found[c.cgroup, c.device].append(refusal)
    return found


def _host_count(counters: Mapping[Count, int], kind: int, reason: int) -> int:
    return sum(n for c, n in counters.items() if (c.cgroup, c.kind, c.reason) == (0, kind, reason))


def _tenant(look: _Look, tenant: Tenant) -> TenantView:
    own = look.processes.get(tenant.cgroup, {})
    how = {tgid: _how(look, tgid, p) for tgid, p in own.items()}
    why = {tgid: _why(look, tgid, p, how[tgid]) for tgid, p in own.items()}
    views = tuple(
        ProcessView(tgid, d.index, p.bytes[d.index], how[tgid], why[tgid])
        for tgid, p in own.items()
        for d in look.devices
        if p.bytes[d.index]
    )
    bypassing = Counter(filter(None, how.values()))
    workload = tenant.workload
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
        denied=look.enforcer.denied(tenant.cgroup),
        notes=tenant.notes,
        labels=tenant.metric_labels,
        bypassing=dict(bypassing),
        devices=tuple(_tenant_device(look, tenant, own, device) for device in look.devices),
        processes=views,
        shimless=dict(Counter(filter(None, why.values()))),
        orphans=tuple(_orphan(look, orphan) for orphan in look.truth.orphans if tenant.cgroup in orphan.levels),
    )


def _kind(look: _Look, tenant: Tenant) -> str:
    if look.enforcer.get(tenant.cgroup) is None:
        return "gone"
    return "group" if tenant.cgroup in look.groups else "tenant"


def _orphaned(orphans: Iterable[Orphan]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for orphan in orphans:
        found[orphan.device] += orphan.bytes
    return dict(found)


def _orphan(look: _Look, orphan: Orphan) -> OrphanView:
    seconds = max(0.0, (look.now_ns - orphan.since_ns) / NS)
    keepers, parents = look.keepers.of(orphan.tgid), look.keepers.parents_of(orphan.tgid)
    return OrphanView(orphan.tgid, orphan.device, orphan.bytes, seconds, bool(orphan.ended_ns), keepers, parents)


def _enforcement(look: _Look, tenant: Tenant, bypassing: Iterable[str]) -> str:
    kills = tenant.kill and not look.enforcer.spares(tenant)
    return enforcement(look.unenforced, tenant.observe, kills, bypassing)


def _how(look: _Look, tgid: int, process: Process) -> str:
    """Return how a process bypasses the shim; empty: it does not.

    The first that applies: `older`, it started before fgpu; `unprobed`, it maps a library that could not be probed, so
    that its calls are unknown; `standalone`, it found no agent and keeps its image's own limit; `no_admission`, its
    calls are seen without an admission; `no_shim` or `unwitnessed`, it has memory and no shim, or no call of it is
    seen; `outside_turns` or `empty_turns`, NVML sees it run outside its turns, or run nothing in them. A process that
    ends while it is adopted does none of that, and is swept soon.
    """
    if tgid in look.enforcer.preexisting and any(process.bytes) and not procfs.ended(tgid):
        return "older"
    if tgid in look.unprobed and any(process.bytes):
        return "unprobed"
    if tgid in look.standalone and any(process.bytes) and not process.flags & abi.Seen.SHIM:
        return "standalone"
    if process.flags & abi.Seen.BYPASS:
        return "no_admission"
    if not process.flags & abi.Seen.SHIM and any(process.bytes) and not procfs.ended(tgid):
        return "no_shim" if process.flags & abi.Seen.CALL else "unwitnessed"
    if any((tgid, d.index) in look.unwitnessed for d in look.devices):
        return "unwitnessed"
    if tgid in look.truth.turns.outside:
        return "outside_turns"
    return "empty_turns" if tgid in look.truth.turns.empty else ""


def _why(look: _Look, tgid: int, process: Process, how: str) -> str:
    """Return why a bypassing process has no shim; empty: it has one, or the reason is unknown."""
    if how not in _WITHOUT or process.flags & abi.Seen.SHIM:
        return ""
    return look.reasons.of(tgid, process.generation) or ""


def _tenant_device(look: _Look, tenant: Tenant, own: Iterable[int], device: Device) -> TenantDevice:
    (u,) = look.ledger.usage(tenant.cgroup, (device.index,)) or (None,)
    refusals = tuple(look.refusals.get((tenant.cgroup, device.index), ()))
    compute, drift = _compute(look, tenant, device.index), _drift(look, own, device.index)
    numbers = (u.limit, u.used, u.peak, u.refused, u.admitted, u.witnessed) if u else (0,) * 6
    unwitnessed = sum(look.unwitnessed.get((tgid, device.index), 0) for tgid in own)
    orphaned = u.orphaned if u else 0
    return TenantDevice(device.index, *numbers, drift, refusals, compute, orphaned, unwitnessed)


def _drift(look: _Look, own: Iterable[int], device: int) -> int | None:
    """Return the drift of a tenant; None unless NVML recently showed each of its processes that has memory."""
    age = _age(look, device)
    known = [look.truth.drift.get((tgid, device)) for tgid in own]
    if not known or None in known or age is None or age > STALE_SECONDS:
        return None
    return sum(filter(None, known))


def _age(look: _Look, device: int) -> float | None:
    """Return the seconds since NVML answered for a device."""
    at = look.truth.answered.get(device)
    return None if at is None else look.now_ns / NS - at


def _compute(look: _Look, tenant: Tenant, device: int) -> ComputeView | None:
    share = tenant.shares.get(device)
    if share is None:
        return None
    t = look.turns.get((tenant.cgroup, device)) or TurnCounts()
    return ComputeView(
        share.limit_millionths / MILLION, share.weight, list(Priority)[share.rank].value, t.owned_ns / NS, t.waits,
        t.wait_ns / NS, t.throttled, t.overruns, bool(t.owner), t.had_millionths / MILLION,
        t.entitled_millionths / MILLION, bool(t.free), (look.now_ns - t.since_ns) / NS if t.since_ns else None,
        look.truth.turns.beyond.get((tenant.cgroup, device)), look.shortfalls.get((tenant.cgroup, device)),
    )  # fmt: skip


def _slices(gatekeeper: Mapping[str, Any], device: int) -> SlicesView | None:
    try:
        slices = gatekeeper["slices"]
        counts = slices["devices"][str(device)]
        bounds = tuple(ns / NS for ns in slices["bounds_ns"])
        drains = tuple(counts["drains"])
        return SlicesView(counts["switches"], counts["overruns"], counts["drain_ns"] / NS, bounds, drains)
    except (KeyError, TypeError):
        return None


def _owner(look: _Look, device: int) -> str | None:
    owners = (look.enforcer.get(level) for (level, index), t in look.turns.items() if index == device and t.owner)
    return next((tenant.name for tenant in owners if tenant), None)


def _device(
    device: Device, look: _Look, processes: Mapping[int, Process], gatekeeper: Mapping[str, Any], orphaned: int
) -> DeviceView:
    truth, enforcer = look.truth, look.enforcer
    held, ended = truth.held.get(device.index), truth.ended.get(device.index, {})
    outside = [None] if held is None else [
        bytes_ if bytes_ is None else bytes_ - ended.get(pid, 0)
        for pid, bytes_ in held.items()
        if pid not in processes and (bytes_ is None or bytes_ > ended.get(pid, 0))
        and not procfs.ended(pid)  # it may have ended since NVML was asked
    ]  # fmt: skip
    unmanaged = None if None in outside else sum(filter(None, outside))
    return DeviceView(
        device.index, device.uuid_text, device.name, device.pci_bus_id, device.capacity_bytes,
        truth.used.get(device.index), enforcer.commitments.committed(device.index), unmanaged,
        _slices(gatekeeper, device.index), _owner(look, device.index), _age(look, device.index),
        None if held is None else len(outside), *_xids(truth.xids.get(device.index)), orphaned,
        truth.unexplained.get(device.index),
    )  # fmt: skip


def _xids(reported: Reported | None) -> tuple[Mapping[int, int] | None, int, int | None]:
    return (reported.counts, reported.ignored, reported.fatal) if reported else (None, 0, None)


def _policies(policies: Policies | None) -> PoliciesView | None:
    if policies is None:
        return None
    faults = tuple(str(fault) for fault in policies.faults)
    return PoliciesView(policies.good, policies.loaded_seconds, policies.count, faults, policies.unsaved)


def _gatekeeper(run_dir: Path) -> dict[str, Any]:
    try:
        with open(f"{run_dir}/gatekeeper.json", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _maps(ledger: Ledger) -> tuple[MapView, ...]:
    """Return how full each table is that all tenants share.

    Entries of the large maps are not counted one by one: of tables that owners of bounds have parts of, the claimed
    entries count.
    """
    claimed = zip(COUNTED.items(), ledger.owners.claimed(), strict=False)
    return (
        MapView("levels", ledger.levels_taken(), PLACES),
        MapView("resolved", ledger.resolutions.count(), resolutions.MOST),
        *(MapView(name, entries, most) for (name, most), entries in claimed),
    )
