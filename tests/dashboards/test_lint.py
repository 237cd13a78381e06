"""The rules of grafana/dashboard-linter, and a check that the files are what make.py writes.

Prometheus itself checks that a query is valid PromQL: test_queries runs every query.
"""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest

from .conftest import FOLDER, NAMES

UNITS = {"none", "short", "bytes", "percentunit", "binBps", "ops", "s", "bool_yes_no"}  # of Grafana's own names
VARIABLES = {"datasource", "cluster", "job", "instance", "gpu", "tenant"}
SELECTOR = re.compile(r"\b(?:fgpu_\w+|up)\b(\{[^}]*\})?")


@pytest.fixture(params=NAMES)
def dashboard(request: pytest.FixtureRequest, dashboards: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return dashboards[request.param]


@pytest.fixture
def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_what_make_writes(name: str) -> None:
    made = runpy.run_path(str(FOLDER / "make.py"))
    assert (FOLDER / f"{name}.json").read_text() == made["text"](name), "python3 dashboards/make.py"


def test_variables(dashboard: dict[str, Any]) -> None:
    """template-datasource, -job, -instance, -on-time-change-reload and uneditable."""
    found = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert found.keys() == VARIABLES
    assert (found["datasource"]["type"], found["datasource"]["query"]) == ("datasource", "prometheus")
    assert found["datasource"]["label"] == "Data source"
    for name in VARIABLES - {"datasource"}:
        it = found[name]
        assert (it["type"], it["datasource"]["uid"], it["multi"], it["refresh"]) == ("query", "${datasource}", True, 2)
        assert re.fullmatch(rf"label_values\(fgpu_\w+(\{{.*\}})?, {name}\)", it["query"])
    for name in ("job", "instance"):
        assert (found[name]["label"], found[name]["allValue"]) == (name.title(), ".+")
    assert dashboard["editable"] is False


def test_panels(dashboard: dict[str, Any]) -> None:
    """panel-datasource, -title-description, -units and -no-targets."""
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["targets"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_every_selector_names_cluster_job_and_instance(queries: list[str]) -> None:
    """target-job and target-instance."""
    for expr in queries:
        for selector in SELECTOR.finditer(expr):
            for name in ("cluster", "job", "instance"):
                assert f'{name}=~"${name}"' in (selector[1] or ""), f"{selector[0]} in {expr}"


def test_rates_and_counters(queries: list[str]) -> None:
    """The rules target-rate-interval and target-counter-agg; no `or vector()`, which shows 0 without a measurement."""
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
