"""Snapshot -> Prometheus metric families. Pure.

Owns: the names of the metrics. Never: looks at the host; a number that the Snapshot lacks is absent. Cannot fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import fgpu_ebpf
from fgpu_ebpf.snapshot import DeviceView, Snapshot, TenantDevice

_TENANT_GAUGES: tuple[tuple[str, str, Callable[[TenantDevice], int | None]], ...] = (
    ("fgpu_memory_limit_bytes", "Bytes that the tenant may hold on the device", lambda d: d.limit_bytes),
    ("fgpu_memory_used_bytes", "Bytes charged to the tenant on the device", lambda d: d.used_bytes),
    ("fgpu_memory_peak_bytes", "Most bytes charged at once", lambda d: d.peak_bytes),
    ("fgpu_memory_drift_bytes", "Ledger minus driver, for what NVML shows", lambda d: d.drift_bytes),
)
_TENANT_COUNTERS: tuple[tuple[str, str, Callable[[TenantDevice], int]], ...] = (
    ("fgpu_memory_admitted_bytes", "Bytes admitted, contexts aside", lambda d: d.admitted_bytes),
    ("fgpu_memory_witnessed_bytes", "Bytes that the driver was seen to allocate", lambda d: d.witnessed_bytes),
)
_DEVICE_GAUGES: tuple[tuple[str, str, Callable[[DeviceView], int | None]], ...] = (
    ("fgpu_device_memory_capacity_bytes", "Total memory of the device, by NVML", lambda d: d.capacity_bytes),
    ("fgpu_device_memory_used_bytes", "Memory in use on the device, by NVML", lambda d: d.used_bytes),
    ("fgpu_device_memory_committed_bytes", "Sum of the tenants' limits", lambda d: d.committed_bytes),
    ("fgpu_device_memory_unmanaged_bytes", "Held by processes outside any tenant", lambda d: d.unmanaged_bytes),
)


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """All metric families of one Snapshot."""
    yield from _tenants(snapshot)
    yield from _tenant_devices(snapshot)
    yield from _devices(snapshot)
    yield from _host(snapshot)


def _tenants(snapshot: Snapshot) -> Iterator[Metric]:
    info = GaugeMetricFamily("fgpu_tenant_info", "Names of a tenant", labels=["tenant", "kind", "cgroup_path"])
    processes = GaugeMetricFamily("fgpu_processes", "Processes charged to the tenant", labels=["tenant"])
    bypassing = GaugeMetricFamily("fgpu_bypassing_processes", "Allocate without the shim", labels=["tenant", "how"])
    mode = GaugeMetricFamily("fgpu_tenant_enforcement", "1: how limits are kept", labels=["tenant", "mode"])
    for tenant in snapshot.tenants:
        info.add_metric([tenant.tenant, tenant.kind, tenant.path], 1)
        processes.add_metric([tenant.tenant], len({p.pid for p in tenant.processes}))
        bypassing.add_metric([tenant.tenant, "no_admission"], tenant.bypassing)
        mode.add_metric([tenant.tenant, tenant.enforcement], 1)
    yield from (info, processes, bypassing, mode)


def _tenant_devices(snapshot: Snapshot) -> Iterator[Metric]:
    rows = [(t, d) for t in snapshot.tenants for d in t.devices]
    labels = ["tenant", "gpu"]
    for name, text, value in _TENANT_GAUGES:
        family: Metric = GaugeMetricFamily(name, text, labels=labels)
        yield _filled(family, (([t.tenant, str(d.gpu)], value(d)) for t, d in rows))
    for name, text, number in _TENANT_COUNTERS:
        yield _filled(
            CounterMetricFamily(name, text, labels=labels), (([t.tenant, str(d.gpu)], number(d)) for t, d in rows)
        )
    refused = CounterMetricFamily("fgpu_memory_refused", "Admissions refused", labels=[*labels, "operation", "reason"])
    for tenant, device in rows:
        for refusal in device.refusals:
            refused.add_metric([tenant.tenant, str(device.gpu), refusal.operation, refusal.reason], refusal.count)
    yield refused


def _devices(snapshot: Snapshot) -> Iterator[Metric]:
    info = GaugeMetricFamily("fgpu_device_info", "Names of a device", labels=["gpu", "gpu_uuid", "model", "pci_bus_id"])
    for device in snapshot.devices:
        info.add_metric([str(device.index), device.uuid, device.name, device.pci_bus_id], 1)
    yield info
    for name, text, value in _DEVICE_GAUGES:
        family = GaugeMetricFamily(name, text, labels=["gpu"])
        yield _filled(family, (([str(d.index)], value(d)) for d in snapshot.devices))


def _host(snapshot: Snapshot) -> Iterator[Metric]:
    anomalies = CounterMetricFamily("fgpu_anomalies", "What should not happen, counted in the kernel", labels=["kind"])
    for kind, count in snapshot.anomalies.items():
        anomalies.add_metric([kind], count)
    yield anomalies
    yield GaugeMetricFamily("fgpu_reconcile_age_seconds", "Since NVML last answered", snapshot.reconcile_age_seconds)
    build = GaugeMetricFamily("fgpu_build_info", "Version of the agent", labels=["version"])
    build.add_metric([fgpu_ebpf.__version__], 1)
    yield build


def _filled(family: Metric, samples: Iterable[tuple[list[str], int | None]]) -> Metric:
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)  # type: ignore[attr-defined]
    return family


class SnapshotCollector(Collector):
    """Shows whatever Snapshot is the latest when somebody asks."""

    def __init__(self, latest: Callable[[], Snapshot]) -> None:
        self._latest = latest

    def collect(self) -> Iterable[Metric]:
        """The families of the latest Snapshot."""
        return families(self._latest())


def registry(latest: Callable[[], Snapshot]) -> CollectorRegistry:
    """A registry that holds fgpu's metrics and no others."""
    own = CollectorRegistry(auto_describe=False)
    own.register(SnapshotCollector(latest))
    return own


def text(snapshot: Snapshot) -> str:
    """The exposition text of one Snapshot."""
    return generate_latest(registry(lambda: snapshot)).decode()
