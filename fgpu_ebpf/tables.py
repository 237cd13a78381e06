"""Snapshots as tables for people. Pure but for names and users, which psutil knows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from fgpu_ebpf import pages
from fgpu_ebpf.policy import memory_text


def _text(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def status(snapshot: Mapping[str, Any]) -> str:
    """Tenants by device."""
    table = _table("TENANT", "KIND", "GPU", "LIMIT", "USED", "PEAK", "REFUSED", "PROCESSES", "HELD BY")
    for tenant in snapshot["tenants"]:
        count = str(len({p["pid"] for p in tenant["processes"]}))
        for d in tenant["devices"]:
            limit = "-" if d["limit_bytes"] == pages.NO_LIMIT else memory_text(d["limit_bytes"])
            sizes = (limit, memory_text(d["used_bytes"]), memory_text(d["peak_bytes"]), str(d["refused"]))
            table.add_row(tenant["tenant"], tenant["kind"], str(d["gpu"]), *sizes, count, tenant["enforcement"])
    return _text(table)


def process_rows(snapshot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tenants' processes, each with the name and user that the host knows."""
    rows = []
    for tenant in snapshot["tenants"]:
        for process in tenant["processes"]:
            rows.append({"tenant": tenant["tenant"], **process, **_names(process["pid"])})
    return rows


def _names(pid: int) -> dict[str, Any]:
    try:
        process = psutil.Process(pid)
        return {"name": process.name(), "user": process.username(), "started": process.create_time()}
    except psutil.Error:
        return {"name": None, "user": None, "started": None}


def processes(rows: list[dict[str, Any]]) -> str:
    """Processes by tenant."""
    table = _table("TENANT", "PID", "GPU", "USED", "USER", "NAME")
    for row in rows:
        who = (row["user"] or "-", row["name"] or "(gone)")
        table.add_row(row["tenant"], str(row["pid"]), str(row["gpu"]), memory_text(row["bytes"]), *who)
    return _text(table)
