"""The text output of `fgpu status`, `fgpu ps`, `fgpu usage` and `fgpu events`.

This module runs in the process of the command. `status` and `ps` show a Snapshot, which is given as JSON. psutil
reports the names and users of processes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fgpu_ebpf import abi
from fgpu_ebpf.linux import printable, procfs
from fgpu_ebpf.policy.units import memory_text
from fgpu_ebpf.tenancy import orphan_text, parking_text
from fgpu_ebpf.tenancy.enforcement import no_limit, sentence
from fgpu_ebpf.tenancy.event_log import line_of

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

MOST_CELLS = 1000  # no name, path or figure is truncated


def _text(table: Table) -> str:
    from rich.console import Console  # this import takes longer than a whole command that prints JSON

    out = io.StringIO()
    Console(file=out, width=MOST_CELLS).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(_literal(column), justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(_literal, cells))


def _literal(cell: str) -> Text:
    """Return a text without markup, control characters and line breaks. A tenant chooses names of its processes."""
    from rich.text import Text

    return Text(printable.line(cell))


def usage(by: str, rows: Sequence[Sequence[str]]) -> str:
    """Return the table of `fgpu usage`. Each row has a name, the source, and numbers as text."""
    table = _table(by.upper(), "SOURCE", "GPU TIME h", "MEMORY GiB*h", "HELD h", "IDLE h", "WAITED h")
    for row in rows:
        _add(table, *row)
    return _text(table) if rows else "no tenant has used a device in this time\n"


def status(snapshot: Mapping[str, Any]) -> str:
    """Return the tables of tenants by device and of compute time, and lines about devices and problems."""
    table = _table("TENANT", "KIND", "GPU", "LIMIT", "USED", "PEAK", "REFUSED", "PROCESSES", "HELD BY")
    for tenant in snapshot["tenants"]:
        count = str(len({p["pid"] for p in tenant["processes"]}))
        for d in tenant["devices"]:
            limit = abi.limit(d["limit_bytes"])
            sizes = (
                "-" if limit is None else memory_text(limit),
                memory_text(d["used_bytes"]),
                memory_text(d["peak_bytes"]),
                str(d["refused"]),
            )
            _add(table, tenant["tenant"], tenant["kind"], str(d["gpu"]), *sizes, count, tenant["enforcement"])
    why = no_limit(snapshot) or _nothing_managed(snapshot)
    parts = (_devices(snapshot), _shares(snapshot), _counted(snapshot), _orphans(snapshot), _parked(snapshot))
    return "".join([_text(table), *parts]) + (f"\n{why}\n" if why else "")


def _devices(snapshot: Mapping[str, Any]) -> str:
    """Return a line for each device with the memory that limits have committed, and the memory that is left."""
    lines = []
    for device in snapshot["devices"]:
        usable = device.get("usable_bytes") or device["capacity_bytes"]  # an older agent reports no usable bytes
        committed, unmanaged = device["committed_bytes"], device["unmanaged_bytes"]
        left = memory_text(max(0, usable - committed))
        line = f"gpu {device['index']}: {memory_text(committed)} of {memory_text(usable)} committed, {left} left"
        line += f"; {memory_text(unmanaged)} held by processes outside tenants" if unmanaged else ""
        lines.append(line + ("; tenants run at the same time" if device.get("sharing") == "concurrent" else ""))
    return "".join(f"\n{line}" for line in lines) + ("\n" if lines else "")


def _nothing_managed(snapshot: Mapping[str, Any]) -> str:
    """Return a text with the next steps if nothing is managed, else an empty text."""
    if snapshot["tenants"]:
        return ""
    count = (snapshot["policies"] or {}).get("count", 0)
    if count:
        return (
            f"Nothing is managed: no workload matches the {count} {'policy' if count == 1 else 'policies'} in force.\n"
            "`fgpu policy list` shows the policies; `fgpu explain pid/N` shows why no policy matches process N."
        )
    return (
        "Nothing is managed: no program and no container has a limit.\n"
        "To limit a program: fgpu run --memory 8GiB -- nvidia-smi\n"
        "To limit containers: fgpu setup docker --memory 8GiB (or podman, containerd, crio, k3s, rke2)"
    )


def _counted(snapshot: Mapping[str, Any]) -> str:
    """Return a line for each tenant with a process that is only counted, or an empty text."""
    lines = [line for tenant in snapshot["tenants"] if (line := sentence(tenant))]
    return "".join(f"\n{line}" for line in lines) + ("\n" if lines else "")


def _orphans(snapshot: Mapping[str, Any]) -> str:
    """Return a line for each lasting orphan, or an empty text. A group's orphans are listed under its tenants alone."""
    lines = [
        f"{tenant['tenant']}: {orphan_text.sentence(orphan)}"
        for tenant in snapshot["tenants"]
        for orphan in orphan_text.lasting(tenant["orphans"])
        if tenant["kind"] != "group"
    ]
    return "".join(f"\n{line}" for line in lines) + ("\n" if lines else "")


def _parked(snapshot: Mapping[str, Any]) -> str:
    """Return a line for each tenant that does not run or will soon be parked, or an empty text."""
    shown = [(tenant, tenant.get("parking")) for tenant in snapshot["tenants"]]  # an older agent reports no parking
    lines = [
        f"{tenant['tenant']}: {parking_text.sentence(parking, tenant['devices'])}"
        for tenant, parking in shown
        if parking_text.is_away(parking)
    ]
    lines += [
        f"{t['tenant']}: {parking_text.plan(parking)}" for t, parking in shown if parking_text.is_planned(parking)
    ]
    return "".join(f"\n{line}" for line in lines) + ("\n" if lines else "")


def _shares(snapshot: Mapping[str, Any]) -> str:
    """Return the table of compute time, or an empty text if no tenant is gated."""
    rows = [(t["tenant"], d["gpu"], d["compute"]) for t in snapshot["tenants"] for d in t["devices"] if d["compute"]]
    if not rows:
        return ""
    table = _table("TENANT", "GPU", "SHARE", "ENTITLED", "LIMIT", "WEIGHT", "PRIORITY", "WAITED", "OWNER")
    for tenant, gpu, c in rows:
        entitled = f"{c['entitled_ratio']:.1%}" if c["entitled_ratio"] else "-"  # the tenant does not use the device
        free = "concurrent" if c.get("is_concurrent") else "alone"  # an earlier agent does not report it
        parts = (free, "-") if c["free"] else (f"{c['had_ratio']:.1%}", entitled)
        limit = f"{c['limit_ratio']:.0%}" if c["limit_ratio"] < 1 else "-"
        waited = f"{c['wait_seconds']:.1f}s"
        _add(table, tenant, str(gpu), *parts, limit, str(c["weight"]), c["priority"], waited, _mark(c["is_owner"]))
    short = [(tenant, gpu, c["shortfall"]["why"]) for tenant, gpu, c in rows if c["shortfall"]]
    lines = [f"{tenant} got less than its entitled time on gpu {gpu}: {why}\n" for tenant, gpu, why in short]
    return "\n".join(["", _text(table), *lines])


def _mark(said: bool) -> str:
    return "*" if said else ""


def event_line(event: Mapping[str, Any]) -> str:
    """Return one event as a line that begins with the local date and time, without control characters."""
    when = time.strftime("%F %T", time.localtime(event["time_seconds"]))
    return printable.line(f"{when} {line_of(dict(event))}")


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """A process on one device, or orphaned memory.

    `tenant`: null if the process belongs to no tenant. `pid`: the pid on the host. `bytes`: the bytes that the process
    is charged for or holds; null if unknown. `how`: the way in which the process bypasses the shim, or empty without a
    bypass. Two values are not bypasses: `unmanaged` (the process is in no tenant) and `orphaned` (the memory of a
    process that has ended, or that has exported and freed the memory). `why`: the reason why the process has no shim,
    the cgroup of an unmanaged process, or the processes that keep orphaned memory. `loader`: the path of the process's
    dynamic loader, in quotes, if the loader is the reason; the process may have chosen the path. `had_ratio`: the part
    of the device's time that the tenant had in the last half second; null if not measured. `name`, `user` and `started`
    (seconds since the epoch): the values of the host; null if the process has ended or the host does not show the
    values. The name of orphaned memory is `(ended)` or `(exported)`.
    """

    tenant: str | None
    pid: int
    gpu: int
    bytes: int | None
    how: str
    why: str
    loader: str
    had_ratio: float | None
    name: str | None
    user: str | None
    started: float | None


def process_rows(snapshot: Mapping[str, Any]) -> list[ProcessRow]:
    """Return one row for each process of a tenant on each device, and one row for each lasting orphan."""
    rows = []
    for tenant in snapshot["tenants"]:
        for process in tenant["processes"]:
            share = next((d["compute"] for d in tenant["devices"] if d["gpu"] == process["gpu"]), None)
            had = share["had_ratio"] if share and not share["free"] else None
            fields = {name: process[name] for name in ("pid", "gpu", "bytes", "how", "why", "loader")}
            name, user, started = _names(process["pid"])
            rows.append(ProcessRow(tenant["tenant"], **fields, had_ratio=had, name=name, user=user, started=started))
        rows += [_orphan_row(tenant["tenant"], orphan) for orphan in orphan_text.lasting(tenant["orphans"])]
    return rows


def unmanaged_rows(snapshot: Mapping[str, Any]) -> list[ProcessRow]:
    """Return one row for each process outside tenants that holds memory. `why` is the path of the process's cgroup."""
    rows = []
    for device in snapshot["devices"]:
        for process in device.get("unmanaged_by", ()):  # an agent of an older version does not list these processes
            name, user, started = _names(process["pid"])
            rows.append(ProcessRow(
                None, process["pid"], device["index"], process["bytes"], how="unmanaged",
                why=procfs.cgroup_path(process["pid"]) or "", loader="", had_ratio=None, name=name, user=user,
                started=started,
            ))  # fmt: skip
    return rows


def _orphan_row(tenant: str, orphan: Mapping[str, Any]) -> ProcessRow:
    """Return the row of orphaned memory, whose process has ended or has exported and freed the memory."""
    fields = {name: orphan[name] for name in ("pid", "gpu", "bytes")}
    state, why = "(ended)" if orphan["ended"] else "(exported)", orphan_text.keepers(orphan)
    return ProcessRow(
        tenant, **fields, how="orphaned", why=why, loader="", had_ratio=None, name=state, user=None, started=None
    )


def _names(pid: int) -> tuple[str, str, float] | tuple[None, None, None]:
    import psutil  # this import takes an eighth of the time of `fgpu status`, which needs no names of processes

    try:
        process = psutil.Process(pid)
        return process.name(), process.username(), process.create_time()
    except psutil.Error:
        return None, None, None


def processes(rows: list[ProcessRow]) -> str:
    """Return the table of process_rows() and unmanaged_rows()."""
    table = _table("TENANT", "PID", "GPU", "USED", "SHARE", "USER", "NAME", "BYPASS")
    for row in rows:
        part = "-" if row.had_ratio is None else f"{row.had_ratio:.1%}"
        bypass = f"{row.how} ({row.why})" if row.why else row.how or "-"
        numbers = (str(row.pid), str(row.gpu), "-" if row.bytes is None else memory_text(row.bytes))
        _add(table, row.tenant or "-", *numbers, part, row.user or "-", row.name or "(gone)", bypass)
    return _text(table)
