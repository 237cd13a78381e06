"""Panels, and their JSON for Grafana. `make.py` has the queries.

The queries of a panel contain Grafana's variables. Values link to the dashboards `tenant` and `node`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 24  # of Grafana's grid
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

# Colours by value: each colour applies from its value on. Grafana's own default is green below 80 and red from 80 on,
# for any number. 0.5 is the threshold for one event, because `increase` extrapolates.
Steps = tuple[tuple[str, float | None], ...]
PLAIN: Steps = (("text", None),)
NONE_IS_GOOD: Steps = (("green", None), ("red", 0.5))
NONE_IS_USUAL: Steps = (("green", None), ("orange", 0.5))
YES_IS_GOOD: Steps = (("red", None), ("green", 1))

KEPT = "${datasource:queryparam}&${cluster:queryparam}&${job:queryparam}&${__url_time_range}"
COLUMNS = {
    "tenant": "Tenant", "kind": "Kind", "cluster": "Cluster", "instance": "Node", "gpu": "GPU", "policy": "Policy",
    "namespace": "Namespace", "pod": "Pod", "container": "Container", "cgroup_path": "Cgroup",
}  # fmt: skip
HIDDEN = ("Time", "job", "__name__")


@dataclass(frozen=True)
class Query:
    """PromQL, and the legend of its series, or the name of its column in a table; empty: the values are hidden."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel. `kind`: stat, gauge, timeseries, table or row; `unit`: a unit's name in Grafana."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    kind: str = "timeseries"
    size: tuple[int, int] = (12, 8)
    defaults: dict[str, Any] = field(default_factory=dict)


def thresholds(steps: Steps) -> dict[str, Any]:
    """Return the colours of a panel as Grafana reads them."""
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]}


def stat(
    title: str, description: str, unit: str, expr: str, steps: Steps = PLAIN, width: int = 4, **defaults: Any
) -> Panel:
    """Return a panel with one number; 0 if there is no series, because the event has never occurred."""
    more = {"noValue": "0", "decimals": 0, "thresholds": thresholds(steps)} | defaults
    return Panel(title, description, unit, [Query(expr)], "stat", (width, 4), more)


def row(title: str) -> Panel:
    """Return the heading of all panels below it."""
    return Panel(title, "", "", [], "row", (WIDTH, 1))


def gauge(title: str, description: str, expr: str) -> Panel:
    """Return a panel with a ratio from 0 to 1."""
    steps = (("green", None), ("orange", 0.9), ("red", 1))
    more = {"min": 0, "max": 1, "decimals": 1, "thresholds": thresholds(steps)}
    return Panel(title, description, "percentunit", [Query(expr)], "gauge", (4, 4), more)


def series(title: str, description: str, unit: str, *queries: Query, **defaults: Any) -> Panel:
    """Return a panel with curves over time."""
    known = {key: value for key, value in ({"min": 0} | defaults).items() if value is not None}
    return Panel(title, description, unit, queries, defaults=known)


def table(title: str, description: str, unit: str, *columns: Query, width: int = 8, **defaults: Any) -> Panel:
    """Return a panel with a table: one column of values for each query, sorted by the first."""
    return Panel(title, description, unit, columns, "table", (width, 8), defaults)


# -- what Grafana reads


def variables(node: str, single: str) -> Iterator[dict[str, Any]]:
    """Yield the variables of a dashboard: cluster to tenant.

    `node`: the selector of the chosen nodes. `single`: the variable that has one value and no "All", or empty.
    """
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}
    queries = {
        "cluster": "fgpu_build_info",
        "job": 'fgpu_build_info{cluster=~"$cluster"}',
        "instance": 'fgpu_build_info{cluster=~"$cluster", job=~"$job"}',
        "gpu": f"fgpu_device_info{{{node}}}",
        "namespace": f"fgpu_tenant_info{{{node}}}",
        "pod": f'fgpu_tenant_info{{{node}, namespace=~"$namespace"}}',
        "tenant": f'fgpu_tenant_info{{{node}, namespace=~"$namespace", pod=~"$pod"}}',
    }
    # "All" of cluster, namespace and pod also matches series without that label. "All" of job and tenant has none,
    # so Grafana inserts the names that it has found, which are fgpu's jobs, and the tenants of the chosen pods.
    every = {"cluster": ".*", "instance": ".+", "gpu": ".+", "namespace": ".*", "pod": ".*"}
    for name, query in queries.items():
        yield {
            "name": name, "label": "GPU" if name == "gpu" else name.capitalize(), "type": "query", "datasource": SOURCE,
            "query": f"label_values({query}, {name})", "refresh": 2, "sort": 1,
            "multi": name != single, "includeAll": name != single,
            **({"current": {"selected": True, "text": ["All"], "value": ["$__all"]}} if name != single else {}),
            **({"allValue": every[name]} if name in every else {}),
        }  # fmt: skip


def link(title: str, board: str, **variables: str) -> dict[str, Any]:
    """Return a link from a value to a dashboard, which keeps the chosen values of all variables except these."""
    chosen = "".join(f"&var-{name}={value}" for name, value in variables.items())
    return {"title": title, "url": f"/d/fgpu-{board}?{KEPT}{chosen}"}


def links(panel: Panel) -> list[dict[str, Any]]:
    """Return the links of a panel's curves: to the tenant if its queries name one, else to the node."""
    legends = {query.legend for query in panel.queries}
    if all("{{instance}}" not in legend for legend in legends):
        return []
    node = {"instance": "${__field.labels.instance}"}
    if all("{{tenant}}" in legend for legend in legends):
        return [link("Tenant ${__field.labels.tenant}", "tenant", tenant="${__field.labels.tenant}", **node)]
    return [link("Node ${__field.labels.instance}", "node", **node)]


def targets(panel: Panel) -> list[dict[str, Any]]:
    """Return the panel's queries as Grafana reads them."""
    now, rows = panel.kind != "timeseries", panel.kind == "table"
    shape = {"instant": now, "range": not now, "format": "table" if rows else "time_series"}
    return [
        {
            "refId": chr(ord("A") + i), "datasource": SOURCE, "expr": q.expr, "legendFormat": "" if rows else q.legend,
            **shape,
        }
        for i, q in enumerate(panel.queries)
    ]  # fmt: skip


def shown(panel: Panel) -> dict[str, Any]:
    """Return what a panel shows and how."""
    defaults = {"unit": panel.unit, **panel.defaults}
    made: dict[str, Any] = {
        "description": panel.description, "datasource": SOURCE, "targets": targets(panel),
        "fieldConfig": {"defaults": defaults, "overrides": []},
    }  # fmt: skip
    reduced = {"reduceOptions": {"calcs": ["lastNotNull"], "values": False}}
    match panel.kind:
        case "stat":
            made["options"] = reduced | {"colorMode": "value", "graphMode": "none"}
        case "gauge":
            made["options"] = reduced
        case "table":
            made |= columns(panel)
        case _:
            legend = {"displayMode": "table", "placement": "bottom", "showLegend": True}
            legend |= {"calcs": ["lastNotNull", "max"], "sortBy": "Last *", "sortDesc": True}
            made["options"] = {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
            defaults["links"] = links(panel)
    return made


def columns(panel: Panel) -> dict[str, Any]:
    """Return the names and links of a table's columns, and the order of its rows."""
    several = len(panel.queries) > 1
    values = {f"Value #{chr(ord('A') + i)}" if several else "Value": q.legend for i, q in enumerate(panel.queries)}
    names = COLUMNS | values
    organize = {
        "excludeByName": dict.fromkeys([*HIDDEN, *(value for value, title in values.items() if not title)], True),
        "indexByName": {name: place for place, name in enumerate(names)},
        "renameByName": {name: title for name, title in names.items() if title},
    }
    node = {"instance": "${__data.fields.Node}"}
    leads = {
        "Tenant": link("Dashboard of this tenant", "tenant", tenant="${__value.raw}", **node),
        "Node": link("Dashboard of this node", "node", instance="${__value.raw}"),
    }
    overrides = [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "links", "value": [to]}]}
        for name, to in leads.items()
    ]
    first = panel.queries[0].legend
    rows = [{"displayName": first, "desc": True}] if first else []
    merge = [{"id": "merge", "options": {}}] if several else []
    return {
        "transformations": [*merge, {"id": "organize", "options": organize}],
        "fieldConfig": {"defaults": {"unit": panel.unit, **panel.defaults}, "overrides": overrides},
        "options": {"showHeader": True, "sortBy": rows},
    }


def laid_out(panels: Sequence[Panel]) -> Iterator[dict[str, Any]]:
    """Yield the panels, placed from left to right and from top to bottom."""
    x = y = below = 0
    for number, panel in enumerate(panels, 1):
        width, height = panel.size
        if x + width > WIDTH:
            x, y = 0, below
        made: dict[str, Any] = {
            "id": number, "type": panel.kind, "title": panel.title,
            "gridPos": {"x": x, "y": y, "w": width, "h": height},
        }  # fmt: skip
        yield made | ({"collapsed": False, "panels": []} if panel.kind == "row" else shown(panel))
        x, below = x + width, max(below, y + height)
