"""Tests of /metrics: comparison with a stored file, and properties of every Snapshot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from fgpu_ebpf.api import metrics
from fgpu_ebpf.policy.fields import RESERVED_LABELS
from fgpu_ebpf.snapshot import DeviceView, Snapshot
from tests.unit.snapshot_kit import snapshot

GOLDEN = Path(__file__).with_name("metrics.txt")


def test_the_text_equals_the_stored_file():
    assert metrics.text(snapshot()) == GOLDEN.read_text()


def test_names_chosen_by_tenants_are_escaped():
    name = 'evil"} 1\nfgpu_memory_used_bytes{tenant="other\\'
    families = list(text_string_to_metric_families(metrics.text(snapshot(name))))
    tenants = {s.labels["tenant"] for f in families for s in f.samples if "tenant" in s.labels}
    assert tenants == {name}


def test_a_path_that_is_not_utf_8_does_not_end_the_text():
    """A folder's name may be any bytes."""
    found = snapshot()
    assert 'cgroup_path="/?"' in metrics.text(replace(found, tenants=(replace(found.tenants[0], path="/\udcff"),)))


def test_each_failed_check_has_a_series():
    failed = replace(snapshot(), lacks={"devices": ("no limit on GPU-1", "a fix"), "usage": ("the disk is full", "")})
    shown = [s for f in metrics.families(failed) for s in f.samples if s.name == "fgpu_check_failed"]
    assert [(s.labels, s.value) for s in shown] == [({"check": "devices"}, 1), ({"check": "usage"}, 1)]


def test_an_unmeasured_value_is_absent():
    empty = Snapshot(1.0, (DeviceView(0, "GPU-1", "x", "y", 1, None, 0, None),))
    shown = {sample.name for family in metrics.families(empty) for sample in family.samples}
    assert "fgpu_device_memory_capacity_bytes" in shown
    assert not shown & {"fgpu_device_memory_used_bytes", "fgpu_reconcile_age_seconds", "fgpu_device_healthy"}
    assert "fgpu_device_xids_total" not in shown


def test_a_device_without_xids_is_healthy_and_has_xid_counters_of_zero():
    """Counters of XIDs exist at 0, so that the first XID is an increase."""
    quiet = DeviceView(0, "GPU-1", "x", "y", 1, None, 0, None, xids={})
    families = list(metrics.families(Snapshot(1.0, (quiet,))))
    shown = [s for f in families for s in f.samples if s.name == "fgpu_device_xids_total"]
    assert [(s.labels["cause"], s.value) for s in shown] == [("program", 0), ("device", 0)]
    assert [s.value for f in families for s in f.samples if s.name == "fgpu_device_healthy"] == [1]


def test_a_tenant_without_a_limit_has_no_metric_of_a_limit():
    found = snapshot()
    (tenant,) = found.tenants
    unlimited = replace(tenant, devices=(replace(tenant.devices[0], limit_bytes=2**64 - 1),))
    shown = metrics.text(replace(found, tenants=(unlimited,)))
    assert "fgpu_memory_limit_bytes{" in metrics.text(found)
    assert "fgpu_memory_limit_bytes{" not in shown


def test_refusal_counters_begin_at_zero():
    """Counters of refusals exist at 0, so that the first refusal is an increase."""
    found = snapshot()
    (tenant,) = found.tenants
    quiet = replace(tenant, devices=(replace(tenant.devices[0], refusals=()),))
    families = metrics.families(replace(found, tenants=(quiet,)))
    (shown,) = [s for f in families for s in f.samples if s.name == "fgpu_memory_refused_total"]
    assert (shown.labels["operation"], shown.labels["reason"], shown.value) == ("memory", "limit", 0)


def test_the_reconcile_age_is_computed_at_the_scrape():
    """The age is correct even if no Snapshot was taken for a long time."""
    found = replace(snapshot(), taken_seconds=101.0)
    family = next(f for f in metrics.registry(lambda: found, lambda: 108.5).collect() if "reconcile_age" in f.name)
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"gpu": "0"}, 7.75)]


def test_a_tenant_on_a_device_has_at_most_sixteen_lasting_series_and_21_in_all():
    samples = [s for f in metrics.families(snapshot()) for s in f.samples if {"tenant", "gpu"} <= s.labels.keys()]
    passing = {"fgpu_compute_shortfall_ratio", "fgpu_compute_waiting_seconds", "fgpu_memory_orphaned_bytes"}
    passing.add("fgpu_memory_parked_bytes")
    assert {s.name for s in samples} >= passing
    steady = [s for s in samples if s.name not in passing and s.labels.get("source") != "nvml"]
    assert len(steady) <= 16, "more series, although the second source of usage is left out"
    assert len(samples) <= 21


def test_every_own_label_of_the_info_metric_is_reserved():
    """A policy with a reserved label is refused, so no policy can set a label twice."""
    assert set(metrics._INFO_LABELS) < RESERVED_LABELS
