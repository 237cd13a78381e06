"""/metrics against a golden file, and what holds for any Snapshot."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from fgpu_ebpf import metrics
from fgpu_ebpf.snapshot import DeviceView, ProcessView, Refusal, Snapshot, Tenant, TenantDevice

GOLDEN = Path(__file__).with_name("metrics.txt")


def snapshot(name: str = "notebook") -> Snapshot:
    device = DeviceView(0, "GPU-1", "NVIDIA H200", "00000000:06:00.0", 150754820096, 644939776, 8 << 30, 23)
    memory = TenantDevice(0, 8 << 30, 101, 1009, 5, 303, 202, -7, (Refusal("memory", "limit", 5),))
    processes = (ProcessView(11, 0, 90), ProcessView(12, 0, 11))
    tenant = Tenant(name, "tenant", "/fgpu/run-1", 481, "kernel", 1, (memory,), processes)
    return Snapshot(1.0, (device,), (tenant,), {"release": 0, "bypass": 3}, 0.25)


def test_the_text_is_the_golden_one():
    assert metrics.text(snapshot()) == GOLDEN.read_text()


def test_names_chosen_by_tenants_are_escaped():
    name = 'evil"} 1\nfgpu_memory_used_bytes{tenant="other\\'
    families = list(text_string_to_metric_families(metrics.text(snapshot(name))))
    tenants = {s.labels["tenant"] for f in families for s in f.samples if "tenant" in s.labels}
    assert tenants == {name}


def test_what_nobody_measured_is_absent():
    empty = Snapshot(1.0, (DeviceView(0, "GPU-1", "x", "y", 1, None, 0, None),))
    shown = {sample.name for family in metrics.families(empty) for sample in family.samples}
    assert "fgpu_device_memory_capacity_bytes" in shown
    assert not shown & {"fgpu_device_memory_used_bytes", "fgpu_reconcile_age_seconds"}


def test_at_most_twelve_series_for_a_tenant_and_device():
    samples = [s for f in metrics.families(snapshot()) for s in f.samples if s.labels.get("tenant")]
    assert len(samples) <= 12
