"""The rules of grafana/dashboard-linter, Grafana's own schema, and a check that make.py writes the committed files.

Prometheus itself checks that a query is valid PromQL: test_queries runs every query.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from .conftest import FOLDER, NAMES

# Of Grafana's own names.
UNITS = {"none", "short", "bytes", "percentunit", "binBps", "ops", "s", "bool_yes_no", "watt", "celsius"}
VARIABLES = {"datasource", "cluster", "job", "instance", "gpu", "namespace", "pod", "tenant"}
GRAFANA = json.loads(Path(__file__).with_name("grafana").joinpath("schema.json").read_text())
# Of dcgm-exporter's etc/default-counters.csv.
DCGM = {f"DCGM_FI_DEV_{name}" for name in ("GPU_UTIL", "MEM_COPY_UTIL", "POWER_USAGE", "GPU_TEMP")}
SELECTOR = re.compile(r"\b(?:fgpu_\w+|up)\b(\{[^}]*\})?")


@pytest.fixture(params=NAMES)
def dashboard(request: pytest.FixtureRequest, dashboards: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return dashboards[request.param]


@pytest.fixture
def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that show data."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.fixture
def queries(panels: list[dict[str, Any]]) -> list[str]:
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_equals_the_output_of_make(name: str, make: dict[str, Any]) -> None:
    assert (FOLDER / f"{name}.json").read_text() == make["text"](name), "python3 dashboards/make.py"


def test_dashboards_have_the_required_variables(dashboard: dict[str, Any]) -> None:
    """The rules are template-datasource, -instance, -on-time-change-reload and uneditable.

    template-job is not: with its pattern `.+`, "All" would have the jobs of other exporters too.
    """
    found = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert found.keys() == VARIABLES
    assert (found["datasource"]["type"], found["datasource"]["query"]) == ("datasource", "prometheus")
    assert found["datasource"]["label"] == "Data source"
    for name in VARIABLES - {"datasource"}:
        it = found[name]
        is_one = (dashboard["uid"], name) == ("fgpu-tenant", "tenant")  # sums of several count a group's tenants twice
        assert (it["multi"], it["includeAll"], "current" in it) == (not is_one, not is_one, not is_one)
        assert (it["type"], it["datasource"]["uid"], it["refresh"]) == ("query", "${datasource}", 2)
        assert re.fullmatch(rf"label_values\(fgpu_\w+(\{{.*\}})?, {name}\)", it["query"])
    assert [found[name]["label"] for name in ("job", "instance")] == ["Job", "Instance"]
    assert found["instance"]["allValue"] == ".+"
    assert not {"job", "tenant"} & {name for name, it in found.items() if "allValue" in it}, "All has only found names"
    for name, by in (("pod", "namespace"), ("tenant", "namespace"), ("tenant", "pod")):
        assert f'{by}=~"${by}"' in found[name]["query"]
    assert dashboard["editable"] is False


def test_panels_have_datasource_title_units_and_targets(
    dashboard: dict[str, Any], panels: list[dict[str, Any]]
) -> None:
    """The rules are panel-datasource, -title-description, -units and -no-targets."""
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["targets"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def invalid(part: dict[str, Any], found: Any) -> list[str]:
    """Return the values that the schema of a part of Grafana does not allow."""
    schema = part | {"definitions": GRAFANA["definitions"]}
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(found)]


def test_grafana_s_schema_has_every_key(dashboard: dict[str, Any], panels: list[dict[str, Any]]) -> None:
    """Dashboard, options and custom fields have the types of @grafana/schema, and no other key."""
    part = GRAFANA["properties"]
    assert invalid(part["dashboard"], dashboard) == []
    assert invalid(part["dashboard"], dashboard | {"panel": []}) != []
    for panel in panels:
        kind, options = panel["type"], panel["options"]
        assert invalid(part["options"]["properties"][kind], options) == []
        assert invalid(part["options"]["properties"][kind], options | {"colourMode": "value"}) != []
        if custom := panel["fieldConfig"]["defaults"].get("custom"):
            assert invalid(part["custom"]["properties"][kind], custom) == []


def test_numbers_have_sorted_thresholds_and_the_expected_colours(panels: list[dict[str, Any]]) -> None:
    """Grafana shows a number without thresholds in green below 80, and in red from 80."""
    colours: dict[str, list[str]] = {}
    for panel in panels:
        if panel["type"] in ("stat", "gauge"):
            steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
            assert steps[0]["value"] is None
            values = [step["value"] for step in steps[1:]]
            assert values == sorted(values)
            colours[panel["title"]] = [step["color"] for step in steps]
    assert colours
    expected = {
        "Nodes down": ["green", "red"], "Gatekeepers down": ["green", "red"], "Devices failed": ["green", "red"],
        "Policies rejected": ["green", "red"], "Tenants": ["text"], "Memory unmanaged": ["text"], "Limit": ["text"],
        "Used": ["text"], "Peak": ["text"], "Policy files valid": ["red", "green"], "Refusals": ["green", "orange"],
    }  # fmt: skip
    for title in colours.keys() & expected.keys():
        assert colours[title] == expected[title], title


def test_legends_are_tables(panels: list[dict[str, Any]]) -> None:
    for panel in panels:
        if panel["type"] == "timeseries":
            legend = panel["options"]["legend"]
            assert (legend["displayMode"], legend["calcs"]) == ("table", ["lastNotNull", "max"])


@pytest.mark.parametrize("name", ["cluster", "node"])
def test_graphs_show_only_few_tenants(dashboards: dict[str, dict[str, Any]], name: str) -> None:
    """A cluster or a node may have a thousand tenants."""
    curves = [panel for panel in dashboards[name]["panels"] if panel["type"] == "timeseries"]
    few = [target["expr"] for panel in curves for target in panel["targets"] if "{{tenant}}" in target["legendFormat"]]
    assert len(few) >= 2
    assert [expr for expr in few if not re.match(r"(top|bottom)k\(", expr)] == []


def test_tables_have_names_for_their_columns(panels: list[dict[str, Any]]) -> None:
    for panel in panels:
        if panel["type"] == "table":
            *merge, organize = panel["transformations"]
            names, hidden = organize["options"]["renameByName"], organize["options"]["excludeByName"]
            assert {"tenant", "instance", "gpu", "cluster"} <= names.keys()
            ids = [target["refId"] for target in panel["targets"]]
            assert [one["id"] for one in merge] == ["merge"] * (len(ids) > 1)  # one row of a tenant, with all values
            values = {f"Value #{one}" for one in ids} if merge else {"Value"}
            assert values <= names.keys() ^ hidden.keys()
            assert len({names[value] for value in values & names.keys()}) == len(values & names.keys())
            assert all(name[0].isupper() for name in names.values())
            assert all(row["displayName"] in names.values() for row in panel["options"]["sortBy"])


def test_names_of_tenants_link_to_their_dashboard(dashboard: dict[str, Any], panels: list[dict[str, Any]]) -> None:
    """Each link leads to an existing dashboard.

    It sets variables of that dashboard, and uses an existing column or label.
    """
    uids, to_tenants = {f"fgpu-{name}" for name in NAMES}, 0
    for panel in panels:
        overrides = panel["fieldConfig"]["overrides"]
        values = [one["value"] for override in overrides for one in override["properties"] if one["id"] == "links"]
        for link in sum(values, panel["fieldConfig"]["defaults"].get("links", [])):
            uid, _, arguments = link["url"].removeprefix("/d/").partition("?")
            assert uid in uids
            assert set(re.findall(r"var-(\w+)=", arguments)) <= VARIABLES
            for label in re.findall(r"__field\.labels\.(\w+)", link["url"] + link["title"]):
                assert all(f"{{{{{label}}}}}" in target["legendFormat"] for target in panel["targets"]), panel["title"]
            to_tenants += uid == "fgpu-tenant"
    assert to_tenants >= (3 if dashboard["uid"] == "fgpu-cluster" else 1)


def test_links_pass_chosen_values_only_to_dashboards_that_can_have_them(
    dashboard: dict[str, Any], dashboards: dict[str, dict[str, Any]]
) -> None:
    """Grafana keeps "All", or several names, from the address for a variable that can have neither."""
    (group, to_tenant) = dashboard["links"]
    assert (group["type"], group["includeVars"]) == ("dashboards", True)
    for other in dashboards.values():
        if set(group["tags"]) <= set(other["tags"]):
            assert all(it["includeAll"] and it["multi"] for it in other["templating"]["list"] if it["type"] == "query")
    assert to_tenant["url"].startswith("/d/fgpu-tenant?")
    assert "var-tenant" not in to_tenant["url"]


def test_queries_use_only_listed_metrics_of_other_exporters(queries: list[str]) -> None:
    """docs/test_references.py compares metrics of fgpu with the agent's own."""
    words = {word for expr in queries for word in re.findall(r"\b[A-Z][A-Z]+_\w+", expr)}
    assert words <= DCGM


def test_every_selector_names_cluster_job_and_instance(queries: list[str]) -> None:
    """The rules are target-job and target-instance."""
    for expr in queries:
        for selector in SELECTOR.finditer(expr):
            for name in ("cluster", "job", "instance"):
                assert f'{name}=~"${name}"' in (selector[1] or ""), f"{selector[0]} in {expr}"


def test_the_one_name_of_a_tenant_is_no_pattern(dashboards: dict[str, dict[str, Any]]) -> None:
    """Grafana does not escape the value of a variable that has only one."""
    panels = dashboards["tenant"]["panels"]
    for expr in (target["expr"] for panel in panels for target in panel["targets"]):
        assert expr.count("$tenant") == expr.count('tenant="$tenant"') > 0


def test_sums_keep_hosts_of_different_clusters_and_jobs_apart(queries: list[str]) -> None:
    """Hosts of two clusters may have the same instance."""
    for expr in queries:
        for labels in re.findall(r"\bby \(([^)]*)\)", expr):
            names = set(labels.replace(" ", "").split(","))
            assert "instance" not in names or {"cluster", "job"} <= names, expr


def test_counters_are_queried_as_rates_or_increases(queries: list[str]) -> None:
    """The rules are target-rate-interval and target-counter-agg.

    `or vector()` is not allowed: it shows 0 without a measurement.
    """
    for expr in queries:
        assert "vector(" not in expr
        for function, rest in re.findall(r"\b(rate|irate|increase)\((\w+\{[^}]*\}\[[^]]*\])", expr):
            assert rest.endswith("[$__range]" if function == "increase" else "[$__rate_interval]"), expr
        counters = re.findall(r"fgpu_\w+_(?:total|bucket)\b", expr)
        assert len(counters) == len(re.findall(r"\b(?:rate|increase)\(fgpu_\w+_(?:total|bucket)\{", expr)), expr


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
