"""Tests of alerts, with promtool's own unit tests: which series make each alert fire, and which do not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.host import ROOT

from .conftest import FOLDER
from .prometheus_kit import promtool

RULES = FOLDER / "rules.yaml"
RUNBOOKS = (ROOT / "docs/runbooks.md").read_text()
ALERTS = {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
HERE = 'cluster="c",job="fgpu",instance="n"'
ON = f'{HERE},gpu="0",tenant="t"'
GIB = 1 << 30

MINUTES = {"FgpuTenantIdle": 300}  # minutes of the series, if not 20
HOLDING = {
    f"fgpu_memory_used_bytes{{{ON}}}": f"{2 * GIB}x300",
    f'fgpu_tenant_info{{{HERE},tenant="t",kind="tenant"}}': "1x300",
}

# For each alert: series that make it fire within 20 minutes, and series that do not.
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "FgpuAgentDown": ({f"up{{{HERE}}}": "0x20"}, {f"up{{{HERE}}}": "1x20"}),
    "FgpuGatekeeperDown": ({f"fgpu_gatekeeper_up{{{HERE}}}": "0x20"}, {f"fgpu_gatekeeper_up{{{HERE}}}": "1x20"}),
    "FgpuNotEnforced": (
        {
            f'fgpu_tenant_enforcement{{{HERE},tenant="t",mode="none"}}': "1x20",
            f"fgpu_memory_limit_bytes{{{ON}}}": "1x20",
        },
        {f'fgpu_tenant_enforcement{{{HERE},tenant="t",mode="none"}}': "1x20"},  # the tenant has no limit
    ),
    "FgpuOverLimit": (
        {f"fgpu_memory_used_bytes{{{ON}}}": "101x20", f"fgpu_memory_limit_bytes{{{ON}}}": "100x20"},
        {f"fgpu_memory_used_bytes{{{ON}}}": "100x20", f"fgpu_memory_limit_bytes{{{ON}}}": "100x20"},
    ),
    "FgpuLimitNearlyFull": (
        {f"fgpu_memory_used_bytes{{{ON}}}": "97x20", f"fgpu_memory_limit_bytes{{{ON}}}": "100x20"},
        {f"fgpu_memory_used_bytes{{{ON}}}": "95x20", f"fgpu_memory_limit_bytes{{{ON}}}": "100x20"},
    ),
    "FgpuRefusals": (
        {  # refused before it was first scraped
            f'fgpu_memory_refused_total{{{ON},reason="limit"}}': "_x17 1x3",
            f"fgpu_build_info{{{HERE}}}": "1x20",
        },
        {
            f'fgpu_memory_refused_total{{{ON},reason="limit"}}': "5x20",
            f'fgpu_memory_refused_total{{{ON},reason="observed"}}': "0+1x20",
        },
    ),
    "FgpuBypass": (
        {f'fgpu_bypassing_processes{{{HERE},tenant="t",how="no_shim"}}': "2x20"},
        {f'fgpu_bypassing_processes{{{HERE},tenant="t",how="no_shim"}}': "0x20"},
    ),
    "FgpuDrift": (
        {f"fgpu_memory_drift_bytes{{{ON}}}": f"-{GIB}x20"},
        {f"fgpu_memory_drift_bytes{{{ON}}}": f"{38 << 20}x20"},  # a pool's last block
    ),
    "FgpuUnexplainedMemory": (
        {f'fgpu_device_memory_unexplained_bytes{{{HERE},gpu="0"}}': f"{GIB}x20"},
        {f'fgpu_device_memory_unexplained_bytes{{{HERE},gpu="0"}}': f"{200 << 20}x20"},
    ),
    "FgpuDriverSilent": (
        {f'fgpu_reconcile_age_seconds{{{HERE},gpu="0"}}': "0+60x20"},
        {f'fgpu_reconcile_age_seconds{{{HERE},gpu="0"}}': "0.5x20"},
    ),
    "FgpuDeviceFailed": (
        {f'fgpu_device_healthy{{{HERE},gpu="0"}}': "1x10 0x9"},
        {f'fgpu_device_healthy{{{HERE},gpu="0"}}': "1x20"},
    ),
    "FgpuCheckFailed": (
        {f'fgpu_check_failed{{{HERE},check="devices"}}': "1x20"},
        {f'fgpu_check_failed{{{HERE},check="devices"}}': "1x10 stale"},
    ),
    "FgpuTenantShort": (
        {f"fgpu_compute_shortfall_ratio{{{ON}}}": "0x10 0.06x9"},
        {f"fgpu_compute_shortfall_ratio{{{ON}}}": "0x10 0.04x9"},
    ),
    "FgpuTenantIdle": (
        HOLDING | {f"fgpu_tenant_idle_seconds_total{{{ON}}}": "0+60x300"},
        HOLDING | {f"fgpu_tenant_idle_seconds_total{{{ON}}}": "0+60x100 6000x5 6000+60x195"},  # it worked for minutes
    ),
    "FgpuTenantStarved": (
        {
            f"fgpu_compute_seconds_total{{{ON}}}": "0+6x20",  # a tenth of the time
            f"fgpu_compute_wait_seconds_total{{{ON}}}": "0+54x20",
            f"fgpu_compute_entitled_ratio{{{ON}}}": "0.5x20",
        },
        {
            f"fgpu_compute_seconds_total{{{ON}}}": "0+6x20",
            f"fgpu_compute_wait_seconds_total{{{ON}}}": "0+54x20",
            f"fgpu_compute_entitled_ratio{{{ON}}}": "0.1x20",  # its ceiling, or its part of a unit
            f"fgpu_compute_limit_ratio{{{ON}}}": "1x20",
        },
    ),
    "FgpuEventsLost": (
        {f'fgpu_events_lost_total{{{HERE},reason="rate"}}': "0+1x20"},
        {f'fgpu_events_lost_total{{{HERE},reason="rate"}}': "7x20"},
    ),
    "FgpuTableFilling": tuple(  # type: ignore[dict-item]
        {
            f'fgpu_map_entries{{{HERE},map="levels"}}': f"{entries}x20",
            f'fgpu_map_entries_limit{{{HERE},map="levels"}}': "4096x20",
        }
        for entries in (3073, 3072)
    ),
    "FgpuPolicyRejected": (
        {f"fgpu_config_last_reload_successful{{{HERE}}}": "0x20"},
        {f"fgpu_config_last_reload_successful{{{HERE}}}": "1x20"},
    ),
    "FgpuDeviceOvercommitted": tuple(  # type: ignore[dict-item]
        {
            f'fgpu_device_memory_committed_bytes{{{HERE},gpu="0"}}': f"{committed}x20",
            f'fgpu_device_memory_capacity_bytes{{{HERE},gpu="0"}}': f"{GIB}x20",
        }
        for committed in (GIB + 1, GIB)
    ),
    "FgpuUnmanagedMemory": tuple(  # type: ignore[dict-item]
        {
            f'fgpu_device_memory_unmanaged_bytes{{{HERE},gpu="0"}}': f"{unmanaged}x20",
            f'fgpu_device_memory_capacity_bytes{{{HERE},gpu="0"}}': f"{GIB}x20",
        }
        for unmanaged in (GIB // 5, GIB // 20)
    ),
    "FgpuAgentFailures": (
        {f"fgpu_agent_failures_total{{{HERE}}}": "0+1x20"},
        {f"fgpu_agent_failures_total{{{HERE}}}": "3x20"},
    ),
}


def test_every_alert_has_test_series() -> None:
    assert CASES.keys() == ALERTS.keys()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fires", [True, False])
def test_alerts_fire_only_with_their_series(tmp_path: Path, name: str, fires: bool) -> None:
    assert_fires(tmp_path, name, CASES[name][not fires], fires)


@pytest.mark.parametrize(
    ("refused", "build"),
    [("5x4 stale 5x14", "1x4 stale 1x14"), ("_x17 5x3", "_x17 1x3")],
    ids=["a scrape has failed", "Prometheus is new"],
)
def test_refusals_of_earlier_days_are_no_refusals_of_the_last_15_minutes(
    tmp_path: Path, refused: str, build: str
) -> None:
    series = {
        f'fgpu_memory_refused_total{{{ON},reason="limit"}}': refused,
        f"fgpu_build_info{{{HERE}}}": build,
    }
    assert_fires(tmp_path, "FgpuRefusals", series, False)


def test_a_removed_tenant_s_refusals_under_its_new_name_are_no_new_refusals(tmp_path: Path) -> None:
    gone = f'{HERE},tenant="t-4711"'
    series = {
        f'fgpu_memory_refused_total{{{gone},gpu="0",reason="limit"}}': "_x17 5x3",
        f'fgpu_tenant_info{{{gone},kind="gone"}}': "_x17 1x3",
        f"fgpu_build_info{{{HERE}}}": "1x20",
    }
    assert_fires(tmp_path, "FgpuRefusals", series, False)


@pytest.mark.parametrize(
    ("mode", "fires"),
    [("kernel", False), ("observe", False), ("cooperative", True), ("counted", True), ("none", True)],
)
def test_the_alert_not_enforced_fires_unless_the_kernel_enforces_or_the_tenant_is_observed(
    tmp_path: Path, mode: str, fires: bool
) -> None:
    limited = {f"fgpu_memory_limit_bytes{{{ON}}}": "1x20"}
    series = limited | {f'fgpu_tenant_enforcement{{{HERE},tenant="t",mode="{mode}"}}': "1x20"}
    assert_fires(tmp_path, "FgpuNotEnforced", series, fires)


@pytest.mark.parametrize(("mode", "fires"), [("observe", False), ("kernel", True), ("counted", True)])
def test_only_an_observed_tenant_may_exceed_its_limit_without_an_alert(tmp_path: Path, mode: str, fires: bool) -> None:
    series = CASES["FgpuOverLimit"][0] | {f'fgpu_tenant_enforcement{{{HERE},tenant="t",mode="{mode}"}}': "1x20"}
    assert_fires(tmp_path, "FgpuOverLimit", series, fires)


@pytest.mark.parametrize(
    ("held", "kind", "idle_seconds", "fires"),
    [
        (2 * GIB, "tenant", 60, True), (2 * GIB, "tenant", 59, True), (2 * GIB, "tenant", 50, False),
        (GIB, "tenant", 60, False), (2 * GIB, "group", 60, False),
    ],
)  # fmt: skip
def test_a_tenant_that_holds_little_or_works_is_not_idle(
    tmp_path: Path, held: int, kind: str, idle_seconds: int, fires: bool
) -> None:
    """`idle_seconds` is the value of each minute. A group is as idle as its tenants, which have their own alerts."""
    series = {
        f"fgpu_memory_used_bytes{{{ON}}}": f"{held}x300",
        f'fgpu_tenant_info{{{HERE},tenant="t",kind="{kind}"}}': "1x300",
        f"fgpu_tenant_idle_seconds_total{{{ON}}}": f"0+{idle_seconds}x300",
    }
    assert_fires(tmp_path, "FgpuTenantIdle", series, fires)


@pytest.mark.parametrize(("waiting", "fires"), [("0+60x20", True), ("30x20", False), ("_x20", False)])
def test_a_wait_without_end_is_starvation(tmp_path: Path, waiting: str, fires: bool) -> None:
    """The wait is counted only when it ends."""
    entered = {f"fgpu_compute_wait_seconds_total{{{ON}}}": "7x20", f"fgpu_compute_seconds_total{{{ON}}}": "1x20"}
    shares = {f"fgpu_compute_entitled_ratio{{{ON}}}": "0.5x20"}
    series = entered | shares | {f"fgpu_compute_waiting_seconds{{{ON}}}": waiting}
    assert_fires(tmp_path, "FgpuTenantStarved", series, fires)


def assert_fires(tmp_path: Path, name: str, values: dict[str, str], fires: bool) -> None:
    """Check with promtool whether an alert fires at the end of these series."""
    series = [{"series": key, "values": value} for key, value in values.items()]
    firing = {
        "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
        "eval_time": f"{MINUTES.get(name, 20)}m",
    }
    firing["exp_samples"] = [{"labels": "{}", "value": 1}] if fires else []
    test = {"interval": "1m", "input_series": series, "promql_expr_test": [firing]}
    file = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(file))
    promtool("test", "rules", "test.yaml", cwd=tmp_path)


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_has_a_description_and_a_runbook(name: str) -> None:
    rule: dict[str, Any] = ALERTS[name]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"https://fgpu.example/runbooks.html#{name.lower()}"
    (section,) = re.findall(rf"^## {name}$(.*?)(?=^## |\Z)", RUNBOOKS, re.MULTILINE | re.DOTALL)
    for part in ("**Means**", "**Look first**", "**Do**"):
        assert part in section


def test_one_option_changes_the_address_of_every_runbook(make: dict[str, Any]) -> None:
    text = RULES.read_text()
    moved = make["with_runbooks"](text, "https://wiki/fgpu?page=runbooks")
    assert moved.replace("https://wiki/fgpu?page=runbooks", "https://fgpu.example/runbooks.html") == text
    rules = [rule for group in yaml.safe_load(moved)["groups"] for rule in group["rules"]]
    assert {rule["annotations"]["runbook_url"] for rule in rules} == {
        f"https://wiki/fgpu?page=runbooks#{name.lower()}" for name in ALERTS
    }
