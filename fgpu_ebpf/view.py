"""Ledger, workloads and NVML's truth -> Snapshot.

Owns: how the parts are put together. Never: changes anything. A part that is missing leaves its numbers out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fgpu_ebpf import pages
from fgpu_ebpf.devices import Device
from fgpu_ebpf.ledger import Count, Ledger, Process
from fgpu_ebpf.reconcile import Truth
from fgpu_ebpf.snapshot import DeviceView, ProcessView, Refusal, Snapshot, Tenant, TenantDevice
from fgpu_ebpf.workloads import Workload, Workloads


def take_snapshot(
    ledger: Ledger, workloads: Workloads, devices: Iterable[Device], truth: Truth, run_dir: Path
) -> Snapshot:
    """One look at everything."""
    processes, counters, devices = ledger.processes(), ledger.counters(), list(devices)
    tenants = tuple(_tenant(ledger, workloads, w, processes, counters, devices, truth) for w in workloads)
    return Snapshot(
        time_seconds=time.time(),
        devices=tuple(_device(d, tenants, processes, truth) for d in devices),
        tenants=tenants,
        anomalies={a.name.lower(): _anomalies(counters, a) for a in pages.Anomaly},
        reconcile_age_seconds=time.monotonic() - truth.at if truth.at else None,
        gatekeeper=_gatekeeper(run_dir),
    )


def _tenant(
    ledger: Ledger, workloads: Workloads, workload: Workload, processes: Mapping[int, Process],
    counters: Mapping[Count, int], devices: Iterable[Device], truth: Truth,
) -> Tenant:  # fmt: skip
    own = {tgid: p for tgid, p in processes.items() if workload.cgroup in p.levels}
    usage = ledger.usage(workload.cgroup) or []
    shown = [
        TenantDevice(
            d.index, u.limit, u.used, u.peak, u.refused, u.admitted, u.witnessed,
            _drift(own, d.index, truth), _refusals(counters, workload.cgroup, d.index),
        )
        for d, u in zip(devices, usage, strict=False)
    ]  # fmt: skip
    views = [ProcessView(tgid, i, size) for tgid, p in own.items() for i, size in enumerate(p.bytes) if size]
    bypassing = sum(1 for p in own.values() if p.flags & pages.Seen.BYPASS)
    kind = "group" if workloads.is_group(workload) else "tenant"
    return Tenant(workload.name, kind, workload.path, workload.cgroup, "kernel", bypassing, tuple(shown), tuple(views))


def _drift(own: Iterable[int], device: int, truth: Truth) -> int | None:
    known = [truth.drift[tgid, device] for tgid in own if (tgid, device) in truth.drift]
    return sum(known) if truth.at else None


def _refusals(counters: Mapping[Count, int], cgroup: int, device: int) -> tuple[Refusal, ...]:
    return tuple(
        Refusal(pages.Kind(c.kind).name.lower(), pages.Reason(c.reason).name.lower(), n)
        for c, n in counters.items()
        if c.cgroup == cgroup and c.device == device
    )


def _anomalies(counters: Mapping[Count, int], anomaly: int) -> int:
    return sum(n for c, n in counters.items() if c.cgroup == 0 and c.reason == anomaly)


def _device(device: Device, tenants: Iterable[Tenant], processes: Mapping[int, Process], truth: Truth) -> DeviceView:
    limits = [d.limit_bytes for t in tenants for d in t.devices if d.gpu == device.index and t.kind == "tenant"]
    held = truth.held.get(device.index)
    unmanaged = None if held is None else sum(size for pid, size in held.items() if pid not in processes)
    return DeviceView(
        device.index, device.uuid_text, device.name, device.pci_bus_id, device.capacity_bytes,
        truth.used.get(device.index), sum(limits), unmanaged,
    )  # fmt: skip


def _gatekeeper(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((run_dir / "gatekeeper.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
