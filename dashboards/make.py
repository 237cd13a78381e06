#!/usr/bin/env python3
"""Write the dashboards next to this file: `python3 dashboards/make.py`. A test compares the JSON with its output.

`--runbooks URL` also writes that address of the page of runbooks into rules.yaml.

A query names every label that it joins on, so that several clusters, jobs and nodes in one Prometheus stay apart.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grafana import (
    KEPT,
    NONE_IS_GOOD,
    NONE_IS_USUAL,
    WIDTH,
    YES_IS_GOOD,
    Panel,
    Query,
    gauge,
    laid_out,
    row,
    series,
    stat,
    table,
    variables,
)

NODE = 'cluster=~"$cluster", job=~"$job", instance=~"$instance"'
DEVICE = f'{NODE}, gpu=~"$gpu"'
TENANT = f'{NODE}, tenant=~"$tenant"'
BOTH = f'{DEVICE}, tenant=~"$tenant"'
ONE, ONE_ON = f'{NODE}, tenant="$tenant"', f'{DEVICE}, tenant="$tenant"'  # where only one tenant can be chosen
PLACE = "cluster, job, instance"
# The figures of a group include those of its tenants, so a sum over both would count them twice.
_NAMED = f'max by ({PLACE}, tenant) (fgpu_tenant_info{{{TENANT}, kind="tenant"}})'
INNERMOST = f"* on ({PLACE}, tenant) group_left () {_NAMED}"
RATE, RANGE = "$__rate_interval", "$__range"
LEGEND = "{{cluster}} {{instance}} {{gpu}} {{tenant}}"
MOST_SERIES = 20  # of tenants in a panel


def most(expr: str) -> str:
    """Return the highest series of a query, so that a legend stays short with a thousand tenants."""
    return f"topk({MOST_SERIES}, {expr})"


# -- queries that several dashboards have


def grown(metric: str, labels: str, over: str = RANGE) -> str:
    """Return the increase of a counter in the displayed range."""
    return f"sum(increase({metric}{{{labels}}}[{over}]))"


def had(labels: str) -> str:
    """Return the part of the device's time that each tenant owned."""
    return f"sum by ({PLACE}, gpu, tenant) (rate(fgpu_compute_seconds_total{{{labels}}}[{RATE}]))"


def due(labels: str) -> str:
    """Return each tenant's entitlement, by the shares and ceilings of all, also of groups around tenants."""
    return f"sum by ({PLACE}, gpu, tenant) (fgpu_compute_entitled_ratio{{{labels}}})"


def refused(labels: str, by: str) -> Query:
    """Return refusals per second."""
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
    return Query(f"sum by ({by}) (rate(fgpu_memory_refused_total{{{labels}}}[{RATE}]))", legend)


def device_memory(by: str, legend: str) -> list[Query]:
    """Return capacity, used, committed and unmanaged memory."""
    return [
        Query(f"sum{by} (fgpu_device_memory_{what}_bytes{{{DEVICE}}})", f"{legend}{what}")
        for what in ("capacity", "used", "committed", "unmanaged")
    ]


def bypassing(which: str, by: str, legend: str) -> Query:
    """Return the number of bypassing processes. `which`: labels, and INNERMOST for tenants without groups."""
    return Query(f"sum by ({by}) (fgpu_bypassing_processes{which})", legend)


def ratio(above: str, below: str, labels: str) -> str:
    """Return the ratio of two sums."""
    return f"sum({above}{{{labels}}}) / sum({below}{{{labels}}})"


# -- the dashboards

CAPACITY = "fgpu_device_memory_capacity_bytes"
REFUSED = "fgpu_memory_refused_total"
ASKED = "Allocations that were refused in the displayed range, including those that `mode: observe` admitted."
AROUND = "Processes that use CUDA without requesting admission. Their memory is charged."
DEVICES = [  # one row
    stat("Devices failed", "Devices with an XID that no program causes: no share of them is offered.", "none",
         f"count(fgpu_device_healthy{{{DEVICE}}}) - sum(fgpu_device_healthy{{{DEVICE}}})", NONE_IS_GOOD, width=8),
    stat("XIDs", "Errors that devices reported in the displayed range, including those that programs cause.", "none",
         grown("fgpu_device_xids_total", DEVICE), NONE_IS_USUAL, width=8),
    stat("Memory unexplained", "Memory in use on devices that belongs to no process, is charged for no exited process "
         "and is not the driver's own: no tenant can get it.", "bytes",
         f"sum(fgpu_device_memory_unexplained_bytes{{{DEVICE}}})", (("green", None), ("orange", 256 * 2**20)), width=8),
]  # fmt: skip
UTILISATION = "GPU utilisation, by NVIDIA's dcgm-exporter"


def dcgm(metric: str, factor: str = "") -> Query:
    """Return a metric of dcgm-exporter for the chosen devices, which have the same UUID there."""
    chosen = f'label_replace(fgpu_device_info{{{DEVICE}}}, "UUID", "$1", "gpu_uuid", "(.+)")'
    expr = f"max by ({PLACE}, gpu) ({chosen} * on (UUID) group_left () max by (UUID) ({metric})){factor}"
    return Query(expr, "{{cluster}} {{instance}} {{gpu}}")


EMPTY = "No data: Prometheus does not scrape dcgm-exporter."
DEVICE_USE = [  # of DCGM's default counters
    row(UTILISATION),
    series("GPU utilisation", f"Part of the time in which at least one kernel ran, of any tenant. {EMPTY}",
           "percentunit", dcgm("DCGM_FI_DEV_GPU_UTIL", " / 100"), max=1),
    series("Memory bandwidth utilisation", f"Part of the time in which memory was read or written. {EMPTY}",
           "percentunit", dcgm("DCGM_FI_DEV_MEM_COPY_UTIL", " / 100"), max=1),
    series("Power", f"Power of each device. {EMPTY}", "watt", dcgm("DCGM_FI_DEV_POWER_USAGE")),
    series("Temperature", f"Temperature of each device. {EMPTY}", "celsius", dcgm("DCGM_FI_DEV_GPU_TEMP")),
]  # fmt: skip
UNMANAGED = "Memory of processes outside any tenant: no limit holds for them."

CLUSTER = [
    stat("Nodes", "Nodes with an agent that answers.", "none", f"count(fgpu_build_info{{{NODE}}})"),
    stat("Nodes down", "Nodes with an agent that does not answer. Limits still hold there.", "none",
         f"count(up{{{NODE}}}) - sum(up{{{NODE}}})", NONE_IS_GOOD),
    stat("Devices", "GPUs that agents have found.", "none", f"count({CAPACITY}{{{DEVICE}}})"),
    stat("Tenants", "Cgroups with a limit or a share of time, without groups.", "none",
         f'count(fgpu_tenant_info{{{TENANT}, kind="tenant"}})'),
    gauge("Memory used", "Used part of all memory, by NVML.", ratio("fgpu_device_memory_used_bytes", CAPACITY, DEVICE)),
    gauge("Memory committed", "Sum of the tenants' limits, as a part of all memory. Beyond 100 %, not all limits "
          "can be used up at once.", ratio("fgpu_device_memory_committed_bytes", CAPACITY, DEVICE)),
    stat("Memory unmanaged", UNMANAGED, "bytes", f"sum(fgpu_device_memory_unmanaged_bytes{{{DEVICE}}})"),
    stat("Refusals", ASKED, "none", grown(REFUSED, BOTH), NONE_IS_USUAL),
    stat("Bypassing processes", AROUND, "none", f"sum(fgpu_bypassing_processes{{{TENANT}}} {INNERMOST})",
         NONE_IS_USUAL),
    stat("Tenants not enforced by the kernel", "Tenants with the enforcement cooperative, counted, observe or none.",
         "none", f'count((fgpu_tenant_enforcement{{{TENANT}, mode!="kernel"}} == 1) {INNERMOST})', NONE_IS_GOOD),
    stat("Gatekeepers down", "Nodes without a gatekeeper: programs that start there get no memory.", "none",
         f"count(fgpu_gatekeeper_up{{{NODE}}}) - sum(fgpu_gatekeeper_up{{{NODE}}})", NONE_IS_GOOD),
    stat("Policies rejected", "Nodes with an error in their policy files: the last good set is in force.", "none",
         f"count(fgpu_config_last_reload_successful{{{NODE}}}) - sum(fgpu_config_last_reload_successful{{{NODE}}})",
         NONE_IS_GOOD),
    *DEVICES,
    series("Memory", "Of all devices, by NVML: capacity, used, committed to tenants, and outside any tenant.",
           "bytes", *device_memory("", "")),
    series("Memory used, by node", "Used part of the memory of each node's devices, by NVML.", "percentunit",
           Query(f"sum by ({PLACE}) (fgpu_device_memory_used_bytes{{{DEVICE}}}) / "
                 f"sum by ({PLACE}) ({CAPACITY}{{{DEVICE}}})", "{{cluster}} {{instance}}"), max=1),
    series("Refusals, by reason", "Allocations refused per second. `limit`: of the tenant or its group; `device_full`; "
           "`entries`: too many allocations, threads or processes; `observed`: admitted beyond the limit.", "ops",
           refused(BOTH, "reason")),
    series("Bypassing processes, by how", AROUND, "none", bypassing(f"{{{TENANT}}} {INNERMOST}", "how", "{{how}}")),
    series("Share of time", "Part of each device's time: the ten tenants that owned most. A tenant that is alone "
           "on its devices and has no ceiling is not measured.", "percentunit",
           Query(f"topk(10, {had(BOTH)})", LEGEND), max=1),
    series("Share of time against entitlement", "Owned time divided by the entitlement: the ten tenants that got "
           "least. Below 100 %, the tenant was idle or starved.", "percentunit",
           Query(f"bottomk(10, {had(BOTH)} / {due(BOTH)})", LEGEND)),
    table("Top tenants by memory", "The ten tenants that hold most.", "bytes",
          Query(f"topk(10, sum by ({PLACE}, tenant) (fgpu_memory_used_bytes{{{BOTH}}}) {INNERMOST})", "Used")),
    table("Top tenants by refusals", "The ten tenants that were refused most often in the displayed range.", "short",
          Query(f"topk(10, sum by ({PLACE}, tenant) (increase({REFUSED}{{{BOTH}}}[{RANGE}])) {INNERMOST} > 0)",
                "Refusals")),
    table("Top tenants by used part of the limit", "The ten tenants nearest to their limit on a device.", "percentunit",
          Query(f"topk(10, fgpu_memory_used_bytes{{{BOTH}}} / fgpu_memory_limit_bytes{{{BOTH}}})", "Used part")),
    *DEVICE_USE,
]  # fmt: skip

STACKED = {"stacking": {"mode": "normal"}, "fillOpacity": 30}
MEMORY_BY_TENANT = series(
    "Memory, by tenant", "Bytes charged to the twenty tenants that hold most, without groups.", "bytes",
    Query(most(f"sum by ({PLACE}, tenant) (fgpu_memory_used_bytes{{{BOTH}}} {INNERMOST})"),
          "{{cluster}} {{instance}} {{tenant}}"),
    custom=STACKED,
)  # fmt: skip

NODES = [
    stat("Policy files valid", "No: a file has an error, and the last good set is in force.", "bool_yes_no",
         f"min(fgpu_config_last_reload_successful{{{NODE}}})", YES_IS_GOOD, noValue="?"),
    stat("Policies in force", "Documents of all policy files.", "none", f"sum(fgpu_policies{{{NODE}}})"),
    stat("Gatekeeper up", "No: programs that start get no memory.", "bool_yes_no", f"min(fgpu_gatekeeper_up{{{NODE}}})",
         YES_IS_GOOD, noValue="?"),
    stat("NVML's last answer", "Age of the last answer with which charged memory was corrected; normally half a "
         "second.", "s", f"max(fgpu_reconcile_age_seconds{{{DEVICE}}})",
         (("green", None), ("orange", 5), ("red", 30)), decimals=1, noValue="?"),
    stat("Unmanaged processes", "Processes outside any tenant that hold memory.", "none",
         f"sum(fgpu_device_unmanaged_processes{{{DEVICE}}})"),
    stat("Tenants", "Cgroups with a limit or a share of time, without groups.", "none",
         f'count(fgpu_tenant_info{{{TENANT}, kind="tenant"}})'),
    gauge("Memory used", "Used part of all memory, by NVML.", ratio("fgpu_device_memory_used_bytes", CAPACITY, DEVICE)),
    gauge("Memory committed", "Sum of the tenants' limits, as a part of the devices' memory.",
          ratio("fgpu_device_memory_committed_bytes", CAPACITY, DEVICE)),
    stat("Memory unmanaged", UNMANAGED, "bytes", f"sum(fgpu_device_memory_unmanaged_bytes{{{DEVICE}}})"),
    stat("Events lost", "Kernel events that did not reach the agent, in the displayed range. Charges are not affected.",
         "none", grown("fgpu_events_lost_total", NODE), NONE_IS_USUAL),
    stat("Agent failures", "Internal errors of the agent in the displayed range.", "none",
         grown("fgpu_agent_failures_total", NODE), NONE_IS_GOOD),
    stat("Writes refused", "Writes on the control socket by users that may only read, in the displayed range.", "none",
         grown("fgpu_control_refused_total", NODE), NONE_IS_USUAL),
    *DEVICES,
    series("Memory, by device", "By NVML: capacity, used, committed to tenants, and outside any tenant.",
           "bytes", *device_memory(f" by ({PLACE}, gpu)", "{{cluster}} {{instance}} {{gpu}} ")),
    MEMORY_BY_TENANT,
    series("Share of time, by tenant", "Part of each device's time, of the twenty tenants that had most. A tenant "
           "that is alone on its devices and has no ceiling is not measured.", "percentunit",
           Query(most(had(BOTH)), LEGEND), max=1),
    series("Turns", "Turns that began on each device, per second.", "ops",
           Query(f"sum by ({PLACE}, gpu) (rate(fgpu_slice_switches_total{{{DEVICE}}}[{RATE}]))",
                 "{{cluster}} {{instance}} {{gpu}}")),
    series("Drains", "Time from the closing of a gate until nothing was in flight: median and 99th percentile of all "
           "turns.", "s", *(
               Query(f"histogram_quantile({q}, sum by (le, {PLACE}, gpu) "
                     f"(rate(fgpu_slice_drain_seconds_bucket{{{DEVICE}}}[{RATE}])))",
                     f"{{{{cluster}}}} {{{{instance}}}} {{{{gpu}}}} p{int(100 * q)}") for q in (0.5, 0.99))),
    series("Overruns", "Turns per second that passed to the next tenant with work in flight: a program was "
           "stopped, hung, or has long kernels.", "ops",
           Query(f"sum by ({PLACE}, gpu) (rate(fgpu_slice_overruns_total{{{DEVICE}}}[{RATE}]))",
                 "{{cluster}} {{instance}} {{gpu}}")),
    series("Tenants at the same time", "Part of the time in which all tenants of a device could launch at the same "
           "time, because no tenant launched less than in turns.", "percentunit",
           Query(f"sum by ({PLACE}, gpu) (rate(fgpu_slice_lent_seconds_total{{{DEVICE}}}[{RATE}]))",
                 "{{cluster}} {{instance}} {{gpu}}")),
    series("Probe hits", "Calls of the driver and requests of the shim that reached a probe, per second.", "ops",
           Query(f"sum by (probe) (rate(fgpu_probe_hits_total{{{NODE}}}[{RATE}]))", "{{probe}}")),
    series("Anomalies", "Events that should not occur, per second. `bypass`: an allocation without admission; `full`: "
           "a map without room.", "ops",
           Query(f"sum by (kind) (rate(fgpu_anomalies_total{{{NODE}}}[{RATE}]))", "{{kind}}")),
    series("Refusals, by tenant", "Allocations refused per second, of the twenty tenants with most.", "ops",
           Query(most(refused(BOTH, f"{PLACE}, tenant").expr), "{{cluster}} {{instance}} {{tenant}}")),
    series("Containers that wait for labels", "Containers without labels from the engine: policies without "
           "labels apply.", "none", Query(f"sum by ({PLACE}, engine) (fgpu_engine_waiting{{{NODE}}})",
                                           "{{cluster}} {{instance}} {{engine}}")),
    *DEVICE_USE,
]  # fmt: skip

TENANTS = [
    stat("Limit", "Bytes that the tenant may hold, on all selected devices. None: the memory is only counted.", "bytes",
         f"sum(fgpu_memory_limit_bytes{{{ONE_ON}}})", decimals=1, noValue="none"),
    stat("Used", "Bytes charged to the tenant.", "bytes", f"sum(fgpu_memory_used_bytes{{{ONE_ON}}})", decimals=1),
    stat("Peak", "The most bytes that were charged at once, on any single device.", "bytes",
         f"max(fgpu_memory_peak_bytes{{{ONE_ON}}})", decimals=1),
    gauge("Full", "The used part of the tenant's limit, on the fullest device.",
          f"max(fgpu_memory_used_bytes{{{ONE_ON}}} / fgpu_memory_limit_bytes{{{ONE_ON}}})"),
    stat("Refusals", ASKED, "none", grown(REFUSED, ONE_ON), NONE_IS_USUAL),
    stat("Drift", "Charged bytes minus the driver's, where they differ most. A few MiB of a pool are normal.",
         "bytes", f"max(abs(fgpu_memory_drift_bytes{{{ONE_ON}}}))",
         (("green", None), ("orange", 64 * 2**20))),
    stat("Processes", "Processes charged to the tenant.", "none", f"sum(fgpu_processes{{{ONE}}})"),
    stat("Bypassing processes", AROUND, "none", f"sum(fgpu_bypassing_processes{{{ONE}}})", NONE_IS_USUAL),
    stat("Enforced by the kernel", "No: enforcement is cooperative, counted, observe or none.", "bool_yes_no",
         f'count(fgpu_tenant_enforcement{{{ONE}, mode="kernel"}}) == bool '
         f"count(fgpu_tenant_enforcement{{{ONE}}})",
         YES_IS_GOOD, noValue="No"),
    stat("Entitlement", "The least part of a device's time that was due to the tenant in the last half second: by all "
         "weights and ceilings, also of groups around tenants.", "percentunit", f"min({due(ONE_ON)})", noValue="none"),
    stat("Ceiling", "The most of a device's time that the tenant may own.", "percentunit",
         f"min(fgpu_compute_limit_ratio{{{ONE_ON}}})", noValue="none"),
    stat("Throttled", "Times that the ceiling delayed the tenant's turn, in the displayed range.", "none",
         grown("fgpu_compute_throttled_total", ONE_ON)),
    series("Memory", "Charged bytes, their peak, and the limit.", "bytes", *(
        Query(f"sum by ({PLACE}, gpu, tenant) (fgpu_memory_{what}_bytes{{{ONE_ON}}})", f"{LEGEND} {what}")
        for what in ("limit", "used", "peak"))),
    series("Refusals", "Allocations refused per second.", "ops", refused(ONE_ON, "operation, reason")),
    series("Allocated", "Bytes per second: admitted by the kernel, and allocated by the driver. They differ if a "
           "process requests more than it allocates, or requests no admission.", "binBps", *(
               Query(f"sum by ({PLACE}, gpu, tenant) (rate(fgpu_memory_{what}_bytes_total{{{ONE_ON}}}[{RATE}]))",
                     f"{LEGEND} {what}") for what in ("admitted", "witnessed"))),
    series("Drift", "Charged bytes minus the driver's. Below 0, the tenant holds bytes that are not charged.",
           "bytes", Query(f"sum by ({PLACE}, gpu, tenant) (fgpu_memory_drift_bytes{{{ONE_ON}}})", LEGEND), min=None),
    series("Share of time", "Owned time, the entitlement, and the ceiling. Short: the part of the "
           "device's time that a tenant with work got less than its entitlement, in ten seconds. A tenant that is "
           "alone on its devices and has no ceiling is not measured.", "percentunit",
           Query(had(ONE_ON), f"{LEGEND} had"), Query(due(ONE_ON), f"{LEGEND} entitled"),
           Query(f"sum by ({PLACE}, gpu, tenant) (fgpu_compute_shortfall_ratio{{{ONE_ON}}} or "
                 f"0 * fgpu_compute_entitled_ratio{{{ONE_ON}}})", f"{LEGEND} short"),
           Query(f"sum by ({PLACE}, gpu, tenant) (fgpu_compute_limit_ratio{{{ONE_ON}}})", f"{LEGEND} ceiling"), max=1),
    series("Waiting", "The part of the time for which the tenant waited for its turns; added when a turn begins.",
           "percentunit",
           Query(f"sum by ({PLACE}, gpu, tenant) (rate(fgpu_compute_wait_seconds_total{{{ONE_ON}}}[{RATE}]))", LEGEND)),
    series("Waiting for a turn", "How long the tenant has waited for its next turn so far.", "s",
           Query(f"max by ({PLACE}, gpu, tenant) (fgpu_compute_waiting_seconds{{{ONE_ON}}})", LEGEND)),
    series("Bypassing processes, by how", AROUND, "none",
           bypassing(f"{{{ONE}}}", "tenant, how", "{{tenant}} {{how}}")),
    series("Processes without the shim, by reason", "The reasons why processes have no shim.", "none",
           Query(f"sum by (tenant, reason) (fgpu_shimless_processes{{{ONE}}})", "{{tenant}} {{reason}}")),
    table("Names", "The tenant's names, and its policy.", "none",
          Query(f"fgpu_tenant_info{{{ONE}}}"), width=WIDTH),
]  # fmt: skip

RUN, IDLE = "fgpu_tenant_run_seconds_total", "fgpu_tenant_idle_seconds_total"
MEMORY, WAITED = "fgpu_tenant_memory_byte_seconds_total", "fgpu_compute_wait_seconds_total"
# A tenant that has ended has no info now. topk chooses one name if there were several.
_LATEST = f'last_over_time(fgpu_tenant_info{{{TENANT}, kind="tenant"}}[{RANGE}])'
_NAMES = f"topk by ({PLACE}, tenant) (1, max by ({PLACE}, tenant, namespace) ({_LATEST}))"
USES = {  # of one column each: its explanation, its counter, and what one unit of it is
    "GPU hours (turns)": ("The devices' time, measured in turns.", f'{RUN}{{{BOTH}, source="turns"}}', "3600"),
    "GPU hours (NVML)": ("The devices' time, from samples.", f'{RUN}{{{BOTH}, source="nvml"}}', "3600"),
    "Memory GiB hours": ("Charged memory times time.", f"{MEMORY}{{{BOTH}}}", "2 ^ 30 / 3600"),
    "Idle hours": ("Time with memory on a device without running anything there.", f"{IDLE}{{{BOTH}}}", "3600"),
    "Waited hours": ("Time spent waiting for turns.", f"{WAITED}{{{BOTH}}}", "3600"),
}


def spent(counter: str, one: str) -> str:
    """Return the increase of a counter of each tenant in the displayed range, with its namespace, divided by `one`."""
    amount = f"sum by ({PLACE}, tenant) (increase({counter}[{RANGE}]))"
    return f"{amount} * on ({PLACE}, tenant) group_left (namespace) {_NAMES} / {one}"


USAGE = [
    *(stat(name, f"{text} All chosen tenants, in the displayed range.", "none", f"sum({spent(counter, one)})",
           decimals=2) for name, (text, counter, one) in USES.items()),
    table("By tenant", "Use in the displayed range, also of tenants that have ended. By turns: the time that the "
          "tenant owned the device; by NVML: the part of its processes in samples, without turns.", "none",
          *(Query(spent(counter, one), name) for name, (_, counter, one) in USES.items()), width=WIDTH, decimals=2),
    table("By namespace", "The same, of all tenants of a Kubernetes namespace.", "none",
          *(Query(f"sum by (cluster, namespace) ({spent(counter, one)})", name)
            for name, (_, counter, one) in USES.items()), width=WIDTH, decimals=2),
    series("GPU time, by tenant", "Part of each device's time, of the twenty tenants that used most.", "percentunit",
           Query(most(f"sum by ({PLACE}, gpu, tenant) (rate({RUN}{{{BOTH}}}[{RATE}]) {INNERMOST})"), LEGEND),
           custom=STACKED),
    MEMORY_BY_TENANT,
    series("Memory of idle tenants", "Bytes of tenants that run nothing, times the part of the time for which they "
           "ran nothing: the twenty with most.", "bytes",
           Query(most(f"sum by ({PLACE}, gpu, tenant) (fgpu_memory_used_bytes{{{BOTH}}} * on ({PLACE}, gpu, tenant) "
                      f"rate({IDLE}{{{BOTH}}}[{RATE}]) {INNERMOST})"), LEGEND), custom=STACKED),
    series("Memory of parked tenants", "Bytes that parked tenants have given back, which are in host memory: the "
           "twenty with most.", "bytes",
           Query(most(f"sum by ({PLACE}, gpu, tenant) (fgpu_memory_parked_bytes{{{BOTH}}} {INNERMOST})"), LEGEND),
           custom=STACKED),
    series("Waiting, by tenant", "Part of the time for which a tenant waited for its turns: the twenty with most.",
           "percentunit",
           Query(most(f"sum by ({PLACE}, gpu, tenant) (rate({WAITED}{{{BOTH}}}[{RATE}]) {INNERMOST})"), LEGEND)),
]  # fmt: skip


class Board(NamedTuple):
    """A dashboard: its title and panels, the range that it shows at first, and the time between refreshes."""

    title: str
    panels: Sequence[Panel]
    since: str = "now-1h"
    refresh: str = "30s"


DASHBOARDS = {
    "cluster": Board("Cluster", CLUSTER),
    "node": Board("Node", NODES),
    "tenant": Board("Tenant", TENANTS),
    "usage": Board("Who used the GPU", USAGE, "now-7d", "5m"),
}


# -- what Grafana reads


def dashboard(name: str) -> dict[str, Any]:
    """Return one dashboard as Grafana reads it."""
    board = DASHBOARDS[name]
    # A group's figures include those of its tenants, so this dashboard, which adds all, has one tenant.
    chosen = variables(NODE, single="tenant" if name == "tenant" else "")
    links = [
        {"type": "dashboards", "title": "fgpu", "tags": ["fgpu"], "keepTime": True, "includeVars": True, "icon": "",
         "asDropdown": False, "targetBlank": False, "tooltip": ""},
        # Not with the chosen tenants: Grafana would keep "All", which this dashboard does not have.
        {"type": "link", "title": "fgpu / Tenant", "url": f"/d/fgpu-tenant?{KEPT}", "tags": [], "keepTime": False,
         "includeVars": False, "icon": "dashboard", "asDropdown": False, "targetBlank": False, "tooltip": ""},
    ]  # fmt: skip
    return {
        "uid": f"fgpu-{name}", "title": f"fgpu / {board.title}",
        "tags": ["fgpu-tenant" if name == "tenant" else "fgpu"], "schemaVersion": 39,
        "editable": False, "time": {"from": board.since, "to": "now"}, "refresh": board.refresh, "links": links,
        "templating": {"list": list(chosen)}, "panels": list(laid_out(board.panels)),
    }  # fmt: skip


def text(name: str) -> str:
    """Return the text of a dashboard's file."""
    return json.dumps(dashboard(name), indent=1) + "\n"


def with_runbooks(rules: str, url: str) -> str:
    """Return the text of rules.yaml with another address of the page of runbooks."""
    return re.sub(r"(?<=runbook_url: )http[^#\s]+", lambda _: url, rules)


def main() -> None:
    """Write all dashboards, and the address of runbooks if one is given."""
    parser = argparse.ArgumentParser(description="Write the dashboards, and optionally the address of runbooks.")
    parser.add_argument("--runbooks", metavar="URL", help="the address of docs/runbooks.md, to which alerts link")
    url = parser.parse_args().runbooks
    for name in DASHBOARDS:
        Path(__file__).with_name(f"{name}.json").write_text(text(name))
    if url:
        rules = Path(__file__).with_name("rules.yaml")
        rules.write_text(with_runbooks(rules.read_text(), url))


if __name__ == "__main__":
    main()
