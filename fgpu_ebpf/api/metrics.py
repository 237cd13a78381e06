"""The Prometheus metric families of a Snapshot.

This module runs in the agent's main loop for `fgpu metrics`, and in threads of the metrics address, and does no I/O. A
number that is None in the Snapshot has no sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import fgpu_ebpf
from fgpu_ebpf import abi
from fgpu_ebpf.snapshot import ComputeView, DeviceView, ParkingView, SlicesView, Snapshot, TenantDevice, UsageView

_TENANT_GAUGES: tuple[tuple[str, str, Callable[[TenantDevice], int | None]], ...] = (
    ("fgpu_memory_limit_bytes", "Bytes that the tenant may hold on the device", lambda d: abi.limit(d.limit_bytes)),
    ("fgpu_memory_used_bytes", "Bytes charged to the tenant on the device", lambda d: d.used_bytes),
    ("fgpu_memory_peak_bytes", "Most bytes charged to the tenant at any time", lambda d: d.peak_bytes),
    (
        "fgpu_memory_drift_bytes",
        "Bytes in the ledger minus bytes in the driver, as far as NVML reports these bytes",
        lambda d: d.drift_bytes,
    ),
    (
        "fgpu_memory_orphaned_bytes",
        "Bytes still charged for ended processes or for exported memory that was freed; absent if 0",
        lambda d: d.orphaned_bytes or None,
    ),
    (
        "fgpu_memory_parked_bytes",
        "Bytes of parked processes of the tenant, which are in host memory; absent if 0",
        lambda d: d.parked_bytes or None,
    ),
)
_PARKING_COUNTERS: tuple[tuple[str, str, Callable[[ParkingView], float]], ...] = (
    ("fgpu_tenant_parks", "Times that the tenant was parked", lambda p: p.parks),
    ("fgpu_tenant_wakes", "Times that the tenant was woken", lambda p: p.wakes),
    ("fgpu_tenant_park_seconds", "Time that the driver took to copy the tenant to the host", lambda p: p.park_seconds),
    ("fgpu_tenant_wake_seconds", "Time that the driver took to restore the tenant", lambda p: p.wake_seconds),
)
_TENANT_COUNTERS: tuple[tuple[str, str, Callable[[TenantDevice], int]], ...] = (
    ("fgpu_memory_admitted_bytes", "Bytes admitted, without contexts", lambda d: d.admitted_bytes),
    (
        "fgpu_memory_witnessed_bytes",
        "Bytes allocated by calls that the probes have recorded",
        lambda d: d.witnessed_bytes,
    ),
)
_DEVICE_GAUGES: tuple[tuple[str, str, Callable[[DeviceView], int | None]], ...] = (
    (
        "fgpu_device_memory_capacity_bytes",
        "Total memory of the device, as reported by NVML",
        lambda d: d.capacity_bytes,
    ),
    ("fgpu_device_memory_used_bytes", "Memory in use on the device, as reported by NVML", lambda d: d.used_bytes),
    (
        "fgpu_device_memory_committed_bytes",
        "Sum of the limits of tenants that have used the device",
        lambda d: d.committed_bytes,
    ),
    ("fgpu_device_memory_unmanaged_bytes", "Memory held by processes outside any tenant", lambda d: d.unmanaged_bytes),
    (
        "fgpu_device_memory_orphaned_bytes",
        "Memory charged for ended processes or for exported memory that was freed",
        lambda d: d.orphaned_bytes,
    ),
    (
        "fgpu_device_memory_unexplained_bytes",
        "Memory in use on the device that belongs to no process, is not orphaned and is not the driver's own",
        lambda d: d.unexplained_bytes,
    ),
    ("fgpu_device_unmanaged_processes", "Processes outside tenants that hold memory", lambda d: d.unmanaged_processes),
    (
        "fgpu_device_healthy",
        "1: healthy; 0: the device reported an XID that programs do not cause, and no share of the device is offered",
        lambda d: None if d.xids is None else d.fatal_xid is None,
    ),
)


_COMPUTE_COUNTERS: tuple[tuple[str, str, Callable[[ComputeView], float | None]], ...] = (
    (
        "fgpu_compute_seconds",
        "Time for which the tenant owned the device while the tenant was gated",
        lambda c: None if c.free and not c.owned_seconds else c.owned_seconds,
    ),
    ("fgpu_compute_wait_seconds", "Time for which the tenant waited for its turns", lambda c: c.wait_seconds),
    ("fgpu_compute_throttled", "Times that the tenant's ceiling ended or delayed a turn", lambda c: c.throttled),
)
_COMPUTE_GAUGES: tuple[tuple[str, str, Callable[[ComputeView], float | None]], ...] = (
    ("fgpu_compute_weight", "Weight of the tenant when tenants compete for a device", lambda c: c.weight),
    ("fgpu_compute_limit_ratio", "Ceiling of the tenant, as a part of the device's time", lambda c: c.limit_ratio),
    (
        "fgpu_compute_entitled_ratio",
        "Part of the device's time due to the tenant in the last half second, computed from all shares and ceilings",
        lambda c: None if c.free else c.entitled_ratio,
    ),
    (
        "fgpu_compute_shortfall_ratio",
        "Part of the device's time that was due to a busy tenant in the last ten seconds and that the tenant "
        "did not get",
        lambda c: c.shortfall.ratio if c.shortfall else None,
    ),
    (
        "fgpu_compute_waiting_seconds",
        "Time for which the tenant has waited for its next turn so far",
        lambda c: c.waiting_seconds,
    ),
)
_USAGE_COUNTERS: tuple[tuple[str, str, Callable[[UsageView], float]], ...] = (
    (
        "fgpu_tenant_memory_byte_seconds",
        "Bytes charged to the tenant on the device, times the seconds for which the tenant held these bytes",
        lambda u: u.memory_byte_seconds,
    ),
    (
        "fgpu_tenant_idle_seconds",
        "Time for which the tenant had memory on the device and ran on the device for less than 1 % of the time",
        lambda u: u.idle_seconds,
    ),
)
_SLICE_COUNTERS: tuple[tuple[str, str, Callable[[SlicesView], float]], ...] = (
    ("fgpu_slice_switches", "Turns that began on the device", lambda s: s.switches),
    ("fgpu_slice_overruns", "Turns that passed to the next tenant with work in flight", lambda s: s.overruns),
    (
        "fgpu_slice_lent_seconds",
        "Time for which all tenants of the device could launch at the same time, because no tenant launched less than"
        " in turns",
        lambda s: s.lent_seconds,
    ),
)
_INFO_LABELS = ("tenant", "kind", "policy", "namespace", "pod", "container", "cgroup_path")
_FIRST_REFUSAL = ("memory", "limit")  # exported as 0 before the first refusal, so that this refusal is an increase
_HOW = ("no_admission", "no_shim", "unwitnessed", "unprobed", "standalone", "older", "outside_turns", "empty_turns")


def families(snapshot: Snapshot, since_seconds: float = 0.0) -> Iterator[Metric]:
    """Yield all metric families of one Snapshot, which was taken `since_seconds` ago."""
    yield from _tenants(snapshot)
    yield from _tenant_devices(snapshot)
    yield from _devices(snapshot, since_seconds)
    yield from _host(snapshot)


def _tenants(snapshot: Snapshot) -> Iterator[Metric]:
    own = sorted({label for tenant in snapshot.tenants for label in tenant.labels} - set(_INFO_LABELS))
    info = GaugeMetricFamily(
        "fgpu_tenant_info", "Names and labels of the tenant; always 1", labels=[*_INFO_LABELS, *own]
    )
    processes = GaugeMetricFamily("fgpu_processes", "Processes charged to the tenant", labels=["tenant"])
    bypassing = GaugeMetricFamily(
        "fgpu_bypassing_processes", "Processes that use a device without requesting admission", labels=["tenant", "how"]
    )
    shimless = GaugeMetricFamily(
        "fgpu_shimless_processes", "Bypassing processes that have no shim, by reason", labels=["tenant", "reason"]
    )
    mode = GaugeMetricFamily(
        "fgpu_tenant_enforcement",
        "1: mode in force: kernel, cooperative (requested allocations only), counted (no requests), observe, none",
        labels=["tenant", "mode"],
    )
    opens = CounterMetricFamily(
        "fgpu_device_opens_without_shim",
        "Opens of the driver's device nodes by processes without the shim: refused (denied), or not (would_deny)",
        labels=["tenant", "decision"],
    )
    for tenant in snapshot.tenants:
        opens.add_metric([tenant.tenant, "denied"], tenant.opens_denied)
        opens.add_metric([tenant.tenant, "would_deny"], tenant.opens_would_deny)
        path = tenant.path.encode(errors="replace").decode()  # the name of a cgroup may be invalid UTF-8
        names = [tenant.tenant, tenant.kind, tenant.policy, tenant.namespace, tenant.pod, tenant.container, path]
        info.add_metric([*names, *(tenant.labels.get(label, "") for label in own)], 1)
        processes.add_metric([tenant.tenant], len({p.pid for p in tenant.processes}))
        for how in _HOW:
            if tenant.bypassing.get(how) or how == _HOW[0]:
                bypassing.add_metric([tenant.tenant, how], tenant.bypassing.get(how, 0))
        for reason, count in tenant.shimless.items():
            shimless.add_metric([tenant.tenant, reason], count)
        mode.add_metric([tenant.tenant, tenant.enforcement], 1)
    yield from (info, processes, bypassing, shimless, mode, opens)
    parked = [([tenant.tenant], tenant.parking) for tenant in snapshot.tenants if tenant.parking]
    for name, text, value in _PARKING_COUNTERS:
        yield _filled(CounterMetricFamily(name, text, labels=["tenant"]), ((names, value(p)) for names, p in parked))


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
    refused = CounterMetricFamily(
        "fgpu_memory_refused", "Requests for admission that were refused", labels=[*labels, "operation", "reason"]
    )
    for tenant, device in rows:
        counts = {_FIRST_REFUSAL: 0} | {(r.operation, r.reason): r.count for r in device.refusals}
        for why, count in counts.items():
            refused.add_metric([tenant.tenant, str(device.gpu), *why], count)
    yield refused
    yield from _usage([([t.tenant, str(d.gpu)], d.usage) for t, d in rows if d.usage])
    yield from _compute(snapshot)


def _usage(rows: Iterable[tuple[list[str], tuple[UsageView, ...]]]) -> Iterator[Metric]:
    labels = ["tenant", "gpu"]
    ran = CounterMetricFamily(
        "fgpu_tenant_run_seconds",
        "The device's time that the tenant has used, by source: turns (measured), nvml (a sample) or none (unknown)",
        labels=[*labels, "source"],
    )
    for names, usage in rows:
        for one in usage:
            ran.add_metric([*names, one.source], one.run_seconds)
    yield ran
    for name, text, value in _USAGE_COUNTERS:
        family = CounterMetricFamily(name, text, labels=labels)
        yield _filled(family, ((names, sum(map(value, usage))) for names, usage in rows))


def _compute(snapshot: Snapshot) -> Iterator[Metric]:
    rows = [([t.tenant, str(d.gpu)], d.compute) for t in snapshot.tenants for d in t.devices if d.compute]
    labels = ["tenant", "gpu"]
    for name, text, value in _COMPUTE_COUNTERS:
        yield _filled(CounterMetricFamily(name, text, labels=labels), ((names, value(c)) for names, c in rows))
    for name, text, value in _COMPUTE_GAUGES:
        yield _filled(GaugeMetricFamily(name, text, labels=labels), ((names, value(c)) for names, c in rows))


def _slices(snapshot: Snapshot) -> Iterator[Metric]:
    rows = [([str(d.index)], d.slices) for d in snapshot.devices if d.slices]
    for name, text, value in _SLICE_COUNTERS:
        yield _filled(CounterMetricFamily(name, text, labels=["gpu"]), ((gpu, value(s)) for gpu, s in rows))
    drains = HistogramMetricFamily(
        "fgpu_slice_drain_seconds", "Time from the closing of a gate until nothing was in flight", labels=["gpu"]
    )
    for gpu, slices in rows:
        sums = list(accumulate(slices.drains))
        bounds = [*map(str, slices.bounds_seconds), "+Inf"]
        drains.add_metric(gpu, list(zip(bounds, sums, strict=True)), slices.drain_seconds)
    yield drains


def _devices(snapshot: Snapshot, since_seconds: float) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "fgpu_device_info", "Names of the device; always 1", labels=["gpu", "gpu_uuid", "model", "pci_bus_id"]
    )
    for device in snapshot.devices:
        info.add_metric([str(device.index), device.uuid, device.name, device.pci_bus_id], 1)
    yield info
    for name, text, value in _DEVICE_GAUGES:
        family = GaugeMetricFamily(name, text, labels=["gpu"])
        yield _filled(family, (([str(d.index)], value(d)) for d in snapshot.devices))
    age = GaugeMetricFamily("fgpu_reconcile_age_seconds", "Time since NVML last replied for the device", labels=["gpu"])
    ages = (([str(d.index)], d.reconcile_age_seconds) for d in snapshot.devices)
    yield _filled(age, ((gpu, None if at is None else at + since_seconds) for gpu, at in ages))
    yield _xids(snapshot.devices)
    yield from _slices(snapshot)


def _xids(devices: Iterable[DeviceView]) -> Metric:
    """Return the counter of XIDs, by cause instead of by XID, so that 0 is exported before the first XID."""
    xids = CounterMetricFamily("fgpu_device_xids", "XIDs that the device has reported", labels=["gpu", "cause"])
    for device in devices:
        if device.xids is not None:
            xids.add_metric([str(device.index), "program"], device.ignored_xids)
            xids.add_metric([str(device.index), "device"], sum(device.xids.values()) - device.ignored_xids)
    return xids


def _host(snapshot: Snapshot) -> Iterator[Metric]:
    anomalies = CounterMetricFamily("fgpu_anomalies", "Events that should not occur", labels=["kind"])
    for kind, count in snapshot.anomalies.items():
        anomalies.add_metric([kind], count)
    yield anomalies
    hits = CounterMetricFamily(
        "fgpu_probe_hits", "Calls that the probe has recorded, of all processes", labels=["probe"]
    )
    for probe, count in snapshot.probe_hits.items():
        hits.add_metric([probe], count)
    yield hits
    lost = CounterMetricFamily("fgpu_events_lost", "Kernel events that did not reach the agent", labels=["reason"])
    for reason in ("rate", "full"):
        lost.add_metric([reason], snapshot.events.get(reason, 0))
    yield lost
    if snapshot.gatekeeper_up is not None:
        yield GaugeMetricFamily(
            "fgpu_gatekeeper_up", "1: the gatekeeper runs and its socket exists", snapshot.gatekeeper_up
        )
    yield CounterMetricFamily("fgpu_control_refused", "Changes refused on the control socket", snapshot.writes_refused)
    failed = GaugeMetricFamily(
        "fgpu_check_failed", "1: this check of `fgpu doctor` fails; else absent", labels=["check"]
    )
    for check in snapshot.lacks:
        failed.add_metric([check], 1)
    yield failed
    yield CounterMetricFamily("fgpu_agent_failures", "Internal errors of the agent", snapshot.failures)
    if snapshot.policies:
        yield GaugeMetricFamily(
            "fgpu_config_last_reload_successful",
            "1: the policy files had no error when last read",
            snapshot.policies.good,
        )
        yield GaugeMetricFamily(
            "fgpu_config_last_reload_success_timestamp_seconds",
            "Time when policies were last put in force, in seconds since the epoch",
            snapshot.policies.loaded_seconds,
        )
        yield GaugeMetricFamily("fgpu_policies", "Policies in force", snapshot.policies.count)
    yield from _maps(snapshot)
    yield from _engines(snapshot)
    build = GaugeMetricFamily("fgpu_build_info", "Version of the agent", labels=["version"])
    build.add_metric([fgpu_ebpf.__version__], 1)
    yield build


def _maps(snapshot: Snapshot) -> Iterator[Metric]:
    entries = GaugeMetricFamily("fgpu_map_entries", "Entries in use of a table that all tenants share", labels=["map"])
    most = GaugeMetricFamily("fgpu_map_entries_limit", "Entries that the table can have", labels=["map"])
    for view in snapshot.maps:
        entries.add_metric([view.name], view.entries)
        most.add_metric([view.name], view.most)
    yield from (entries, most)


def _engines(snapshot: Snapshot) -> Iterator[Metric]:
    labels = ["engine", "socket"]
    up = GaugeMetricFamily("fgpu_engine_up", "1: the engine answered the last request for labels", labels=labels)
    waiting = GaugeMetricFamily("fgpu_engine_waiting", "Containers whose labels are not reported yet", labels=labels)
    asked = CounterMetricFamily(
        "fgpu_engine_asked", "Requests to the engine for labels, by outcome", labels=[*labels, "outcome"]
    )
    for engine in snapshot.engines:
        names = [engine.name, engine.path]
        up.add_metric(names, engine.is_there and not engine.fault)
        waiting.add_metric(names, engine.waiting)
        for outcome in ("found", "unknown", "failed"):
            asked.add_metric([*names, outcome], getattr(engine, outcome))
    yield from (up, waiting, asked)


def _filled(family: Metric, samples: Iterable[tuple[list[str], float | None]]) -> Metric:
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)  # type: ignore[attr-defined]
    return family


class SnapshotCollector(Collector):
    """The collector of the families of the latest Snapshot at the time of the request."""

    def __init__(self, latest: Callable[[], Snapshot], now: Callable[[], float] = time.monotonic) -> None:
        self._latest = latest
        self._now = now

    def collect(self) -> Iterable[Metric]:
        """Yield the families of the latest Snapshot."""
        snapshot = self._latest()
        return families(snapshot, max(0.0, self._now() - snapshot.taken_seconds) if snapshot.taken_seconds else 0.0)


def registry(latest: Callable[[], Snapshot], now: Callable[[], float] = time.monotonic) -> CollectorRegistry:
    """Return a registry with fgpu's metrics alone. Ages are computed at the time of the request."""
    own = CollectorRegistry(auto_describe=False)
    own.register(SnapshotCollector(latest, now))
    return own


def text(snapshot: Snapshot) -> str:
    """Return the exposition text of one Snapshot."""
    return generate_latest(registry(lambda: snapshot)).decode()
