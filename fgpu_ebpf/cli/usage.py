"""`fgpu usage`: prints the use of devices by tenant, from the store on disk.

This module runs in the process of the command. It needs root, and no agent.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence

import click

from fgpu_ebpf.cli.help_texts import examples
from fgpu_ebpf.cli.request import fail
from fgpu_ebpf.tenancy import usage_store
from fgpu_ebpf.tenancy.usage_store import LABEL, Used

HOUR = 3600
_SPAN = re.compile(r"([0-9]{1,6})([mhd])")
_UNITS = {"m": 60, "h": HOUR, "d": 24 * HOUR}
_COLUMNS: tuple[tuple[str, Callable[[Used], float]], ...] = (
    ("run_seconds", lambda used: used.run),
    ("memory_byte_seconds", lambda used: used.byte_seconds),
    ("held_seconds", lambda used: used.held),
    ("idle_seconds", lambda used: used.idle),
    ("waited_seconds", lambda used: used.waited),
)


def _span(_: click.Context, __: click.Parameter, text: str) -> int:
    """Return the seconds of `90m`, `12h` or `7d`."""
    match = _SPAN.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a length of time: write it as 90m, 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


def _by(_: click.Context, __: click.Parameter, text: str) -> str:
    """Return the name of a property by which the store can group tenants. Raises BadParameter for other names."""
    if text not in ("tenant", "namespace", "user") and not text.startswith(LABEL):
        raise click.BadParameter(f"{text!r} is not a grouping: use tenant, namespace, user or label:NAME")
    return text


@examples("fgpu usage --since 30d", "fgpu usage --by label:team --csv")
@click.command()
@click.option("--since", default="7d", show_default=True, callback=_span, help="Period up to now, e.g. 90m, 12h or 7d.")
@click.option(
    "--by", default="tenant", show_default=True, callback=_by, help="Group by tenant, namespace, user or label:NAME."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, in seconds and byte-seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list, in seconds and byte-seconds.")
def usage(since: int, by: str, as_csv: bool, as_json: bool) -> None:
    """Show what each tenant used: device time, memory times time, time without work, time spent waiting.

    \b
    Hours are summed over all devices. The period begins at a multiple of ten
    minutes, and the last half minute may be missing. SOURCE of GPU TIME:
      turns   measured by the gatekeeper
      nvml    sampled by NVML, for tenants that do not take turns
      none    unknown: NVML does not report it
    HELD is the time with memory on a device. IDLE is the part of HELD in
    which the tenant used less than 1 % of the device's time.
    """
    if os.geteuid():
        fail("`fgpu usage` needs root on the host: use sudo", 1)
    try:
        found = usage_store.grouped(usage_store.read(time.time() - since), by)
    except usage_store.StoreError as error:
        fail(str(error), 1)
    rows = sorted(
        ((who, source, used) for who, of in found.items() for source, used in of.items()),
        key=lambda row: (-row[2].run, -row[2].byte_seconds, row[0]),
    )
    if as_json or as_csv:
        records = [
            {by: who, "source": source} | {name: value(used) for name, value in _COLUMNS} for who, source, used in rows
        ]
        click.echo(json.dumps(records) if as_json else _csv(by, records), nl=as_json)
        return
    from fgpu_ebpf.cli import tables

    click.echo(tables.usage(by, [(who or "-", source, *_hours(source, used)) for who, source, used in rows]), nl=False)


def _hours(source: str, used: Used) -> tuple[str, ...]:
    known = source != "none"
    gib = used.byte_seconds / HOUR / 2**30
    run, idle = (f"{used.run / HOUR:.2f}", f"{used.idle / HOUR:.2f}") if known else ("-", "-")
    return run, f"{gib:.2f}", f"{used.held / HOUR:.2f}", idle, f"{used.waited / HOUR:.2f}"


def _csv(by: str, records: Sequence[Mapping[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, [by, "source", *(name for name, _ in _COLUMNS)])
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()
