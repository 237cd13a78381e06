"""Every query of every panel, run by a real Prometheus that scrapes a real agent.

Every number in a panel is compared with the applied load.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.commands import metrics_page
from tests.support.host import GIB, LISTEN, MIB, ROOT
from tests.support.service import Service
from tests.support.wait import eventually

from . import load as known
from .conftest import NAMES
from .prometheus_kit import CLUSTER, JOB, Labels, Prometheus, exporting, scraping

VARIABLES = json.loads((ROOT / "dashboards/cluster.json").read_text())["templating"]["list"]
# "All" of a variable is its pattern, or else the names that Grafana has found.
CHOSEN = {"__rate_interval": "10s", "__range": "5m", "job": JOB}
CHOSEN |= {variable["name"]: variable["allValue"] for variable in VARIABLES if "allValue" in variable}
PATIENCE_SECONDS = 30
XIDS = "fgpu_device_xids_total"
DCGM = {"GPU_UTIL": 37, "MEM_COPY_UTIL": 11, "POWER_USAGE": 350.5, "GPU_TEMP": 61}  # what dcgm-exporter would export
SILENT = {"Containers that wait for labels", "Memory of parked tenants"}  # no engine, no parker


def chosen(expr: str, tenant: str = ".+") -> str:
    """Return a query with Grafana's variables filled in, as "All" fills them, except for the tenant."""
    return re.sub(r"\$([a-z_]\w*)", lambda found: (CHOSEN | {"tenant": tenant})[found[1]], expr)


@pytest.fixture(scope="module")
def load(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[known.Load]:
    with known.applied(tmp_path_factory.mktemp("load")) as load:
        yield load


@pytest.fixture(scope="module")
def prometheus(load: known.Load, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Return a Prometheus that has scraped the tenants before the first refusal, and the last refusal."""
    (uuid,) = re.findall(r'gpu_uuid="([^"]+)"', metrics_page())
    labels = f'{{gpu="7",UUID="{uuid}",device="nvidia7",Hostname="elsewhere"}}'  # other names than the agent's
    page = "".join(f"DCGM_FI_DEV_{name}{labels} {value}\n" for name, value in DCGM.items())
    work = tmp_path_factory.mktemp("prometheus")
    with exporting(page) as other, scraping(LISTEN, work, other) as prometheus:
        refusals = f'sum(fgpu_memory_refused_total{{tenant="{load.tenants["full"].name}"}})'
        eventually(lambda: prometheus.ask(refusals) == {frozenset(): 0}, PATIENCE_SECONDS, "a scrape before")
        eventually(lambda: set(prometheus.ask(XIDS).values()) == {0}, PATIENCE_SECONDS, "a device without XIDs")
        load.refuse()
        load.report_xids()
        eventually(lambda: prometheus.ask(refusals) == {frozenset(): known.REFUSALS}, PATIENCE_SECONDS, "the refusals")
        eventually(lambda: sum(prometheus.ask(XIDS).values()) == known.XIDS, PATIENCE_SECONDS, "the XIDs")
        yield prometheus


@dataclass(eq=False)
class NoLess:
    """A value that equals all values that are not less."""

    least: float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float | int) and other >= self.least


Expected = float | Any


def totals(load: known.Load) -> dict[str, dict[str, Expected]]:
    """Return the expected values of each dashboard and panel when all tenants are selected."""
    held, in_use = sum(load.used.values()) + known.STRANGER, known.device_used()
    assert held < in_use < held + 128 * MIB  # for each context the driver holds some memory that no process's row has
    memory = {
        "Memory used": pytest.approx(in_use / known.CAPACITY, abs=2**-14),
        "Memory committed": load.committed / known.CAPACITY,
        "Memory unmanaged": known.STRANGER,
        "Tenants": 4,
        "Devices failed": 1,
        "XIDs": known.XIDS,
        "Memory unexplained": NoLess(0),
    }
    cluster = memory | {
        "Nodes": 1, "Nodes down": 0, "Devices": 1, "Gatekeepers down": 0, "Policies rejected": 0,
        "Refusals": known.REFUSALS, "Bypassing processes": 1, "Tenants not enforced by the kernel": 1,
    }  # fmt: skip
    node = memory | {
        "Policy files valid": 1, "Policies in force": 0, "Gatekeeper up": 1, "Unmanaged processes": 1,
        "NVML's last answer": pytest.approx(0.5, abs=0.5), "Events lost": 0,
        "Agent failures": 0, "Writes refused": 0,
    }  # fmt: skip
    return {"cluster": cluster, "node": node}


def of_tenant(load: known.Load, part: str) -> dict[str, Expected]:
    """Return the expected value of each panel of the tenant's dashboard."""
    limit = {"full": known.FULL_LIMIT, "around": known.AROUND_LIMIT}.get(part, known.BUSY_LIMIT)
    used = load.used[load.tenants[part].name]
    shown = {
        "Limit": limit, "Used": used, "Full": used / limit, "Drift": 0, "Processes": 1, "Peak": used,
        "Refusals": known.REFUSALS if part == "full" else 0, "Bypassing processes": int(part == "around"),
        "Enforced by the kernel": None if part == "around" else 1,  # shown as "No"
    }  # fmt: skip
    if part not in known.WEIGHTS:
        return shown | {"Entitlement": None, "Ceiling": None, "Throttled": None}
    return shown | {"Entitlement": known.DUE[part], "Ceiling": known.CEILINGS[part], "Throttled": NoLess(1)}


def numbers(dashboard: dict[str, Any]) -> dict[str, str]:
    """Return the panels that show one number, with their queries."""
    panels = [panel for panel in dashboard["panels"] if panel["type"] in ("stat", "gauge")]
    return {panel["title"]: panel["targets"][0]["expr"] for panel in panels}


def shown(prometheus: Prometheus, panel: str, expr: str) -> float | None:
    """Return the number of a panel, or None without data.

    A count over time is rounded, because Prometheus extrapolates it.
    """
    found = prometheus.ask(expr)
    assert len(found) <= 1, (panel, found)
    value = next(iter(found.values()), None)
    return round(value) if value is not None and "increase(" in expr else value


def assert_shows(prometheus: Prometheus, queries: dict[str, str], expected: dict[str, Expected], tenant: str) -> None:
    """Wait until every panel shows the expected value."""
    assert queries.keys() == expected.keys()

    def wrong() -> dict[str, tuple[float | None, Expected]]:
        found = {panel: shown(prometheus, panel, chosen(expr, tenant)) for panel, expr in queries.items()}
        return {panel: (found[panel], want) for panel, want in expected.items() if found[panel] != want}

    until = time.monotonic() + PATIENCE_SECONDS
    while differing := wrong():
        assert time.monotonic() < until, f"shown, and what it should be: {differing}"
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["cluster", "node"])
def test_each_number_equals_the_applied_load(prometheus: Prometheus, load: known.Load, dashboards, name: str) -> None:
    assert_shows(prometheus, numbers(dashboards[name]), totals(load)[name], ".+")


@pytest.mark.parametrize("part", ["full", "around", "heavy", "light"])
def test_each_number_of_a_tenant_equals_its_load(
    prometheus: Prometheus, load: known.Load, dashboards, part: str
) -> None:
    expected = of_tenant(load, part)
    assert_shows(prometheus, numbers(dashboards["tenant"]), expected, load.tenants[part].name)


@pytest.mark.parametrize("name", NAMES)
def test_each_query_has_an_answer(prometheus: Prometheus, load: known.Load, dashboards, name: str) -> None:
    panels = [panel for panel in dashboards[name]["panels"] if panel["type"] != "row" and panel["title"] not in SILENT]
    tenants = [tenant.name for tenant in load.tenants.values()] if name == "tenant" else [".+"]
    exprs = [(target["expr"], panel["title"]) for panel in panels for target in panel["targets"]]
    asked = {tuple(chosen(expr, tenant) for tenant in tenants): title for expr, title in exprs}
    until = time.monotonic() + PATIENCE_SECONDS
    while unanswered := {title for of_tenants, title in asked.items() if not any(map(prometheus.ask, of_tenants))}:
        assert time.monotonic() < until, unanswered
        time.sleep(0.1)


def by(found: dict[Labels, float], label: str) -> dict[str, float]:
    return {dict(labels)[label]: value for labels, value in found.items()}


def test_tables_and_shares_have_the_right_tenants(prometheus: Prometheus, load: known.Load, dashboards) -> None:
    """The series of memory, refusals, used parts of limits and shares of time have the tenants of the load."""
    panels = [panel for panel in dashboards["cluster"]["panels"] if panel["type"] != "row"]
    queries = {panel["title"]: chosen(panel["targets"][0]["expr"]) for panel in panels}
    names = {part: tenant.name for part, tenant in load.tenants.items()}
    assert by(prometheus.ask(queries["Top tenants by memory"]), "tenant") == load.used
    assert by(prometheus.ask(queries["Top tenants by refusals"]), "tenant").keys() == {names["full"]}
    parts = by(prometheus.ask(queries["Top tenants by used part of the limit"]), "tenant")
    assert max(parts, key=lambda name: parts[name]) == names["full"]
    had = {names[part]: pytest.approx(ceiling, abs=0.08) for part, ceiling in known.CEILINGS.items()}
    eventually(
        lambda: by(prometheus.ask(queries["Share of time"]), "tenant") == had, PATIENCE_SECONDS, "shares of time"
    )


def test_amounts_of_the_usage_dashboard_agree_with_the_load(
    prometheus: Prometheus, load: known.Load, dashboards
) -> None:
    """A tenant holds the same memory all the time, so its memory hours give that time."""
    panels = {panel["title"]: panel for panel in dashboards["usage"]["panels"]}
    names, now = {part: tenant.name for part, tenant in load.tenants.items()}, str(time.time())

    def table(title: str, label: str) -> dict[str, dict[str, float]]:
        columns = panels[title]["transformations"][-1]["options"]["renameByName"]
        return {
            columns[f"Value #{target['refId']}"]: {
                dict(labels).get(label, ""): value
                for labels, value in prometheus.ask(chosen(target["expr"]), time=now).items()
            }
            for target in panels[title]["targets"]
        }

    used, by_namespace = table("By tenant", "tenant"), table("By namespace", "namespace")
    held = {part: used["Memory GiB hours"][name] * GIB / load.used[name] for part, name in names.items()}
    for part in ("full", "around"):
        assert used["Idle hours"][names[part]] == pytest.approx(held[part], rel=0.02)
        assert used["GPU hours (NVML)"][names[part]] == 0
        assert names[part] not in used["GPU hours (turns)"].keys() | used["Waited hours"].keys()
    for part, ceiling in known.CEILINGS.items():
        assert used["GPU hours (turns)"][names[part]] == pytest.approx(ceiling * held[part], abs=0.08 * held[part])
        # Waiting counts from the gatekeeper's first row, memory from the agent's next sample, up to a second later.
        assert 0 < used["Waited hours"][names[part]] < held[part] + 1 / 3600
    for column, amounts in used.items():
        total = pytest.approx(sum(amounts.values()))
        assert by_namespace[column] == {"": total}, column
        assert prometheus.ask(chosen(panels[column]["targets"][0]["expr"]), time=now) == {frozenset(): total}, column
    (idle,) = (chosen(target["expr"]) for target in panels["Memory of idle tenants"]["targets"])
    expected = {names[part]: pytest.approx(load.used[names[part]], rel=0.1) for part in ("full", "around")}
    expected |= {names[part]: pytest.approx(0, abs=0.2 * load.used[names[part]]) for part in known.CEILINGS}
    # A rate over 10 s is a fifth too low where the agent's last sample is two seconds late.
    eventually(lambda: by(prometheus.ask(idle), "tenant") == expected, PATIENCE_SECONDS, "the memory of idle tenants")


@pytest.mark.parametrize("name", ["cluster", "node"])
def test_use_of_devices_equals_that_of_dcgm(prometheus: Prometheus, dashboards, name: str) -> None:
    """fgpu and DCGM both label a device with its UUID. Their other labels differ."""
    panels = {panel["title"]: panel for panel in dashboards[name]["panels"]}
    expected = {"GPU utilisation": 0.37, "Memory bandwidth utilisation": 0.11, "Power": 350.5, "Temperature": 61}
    for title, value in expected.items():
        found = prometheus.ask(chosen(panels[title]["targets"][0]["expr"]))
        assert found == {
            frozenset({("cluster", CLUSTER), ("job", JOB), ("instance", LISTEN), ("gpu", "0")}): pytest.approx(value)
        }, title


def test_variables_list_the_existing_values(prometheus: Prometheus, load: known.Load, dashboards) -> None:
    offered = {
        "cluster": {CLUSTER}, "job": {JOB}, "instance": {LISTEN}, "gpu": {"0"}, "namespace": set(), "pod": set(),
        "tenant": {tenant.name for tenant in load.tenants.values()},
    }  # fmt: skip
    for dashboard in dashboards.values():
        for variable in dashboard["templating"]["list"][1:]:
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            assert set(prometheus.label_values(chosen(selector), label)) == offered[variable["name"]]
