"""`fgpu usage`: print the use of devices by tenant, from the store on disk.

This module runs in the process of the command, which needs root, but no agent.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import click

from fgpu_ebpf.cli.help_texts import examples
from fgpu_ebpf.cli.request import fail
from fgpu_ebpf.tenancy import usage_store
from fgpu_ebpf.tenancy.usage_store import LABEL, Used

HOUR = 3600
_SPAN = re.compile(r"([0-9]{1,6})([mhd])")
_UNITS = {"m": 60, "h": HOUR, "d": 24 * HOUR}


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The use of devices by one group, as far as one source has measured it, summed over all devices.

    The row also contains the name of the group, a string. The key of the name is the value of `--by`: `tenant` by
    default, or `namespace`, `user` or `label:NAME`. The name is empty for tenants without the namespace, user or label.
    `source`: the source of `run_seconds`: `turns`, `nvml` or `none`. `run_seconds`: the time that devices worked for
    the group. `memory_byte_seconds`: bytes on devices times seconds. `held_seconds`: the time with memory on a device.
    `idle_seconds`: the part of `held_seconds` in which the tenant used less than 1 % of the device's time.
    `waited_seconds`: the time in which the group waited for turns. `run_seconds` and `idle_seconds` are None if
    `source` is `none`.
    """

    source: str
    run_seconds: float | None
    memory_byte_seconds: float
    held_seconds: float
    idle_seconds: float | None
    waited_seconds: float

    @classmethod
    def of(cls, source: str, used: Used) -> UsageRow:
        """Return the row of an amount that the store has for this source."""
        known = source != "none"
        run, idle = (used.run, used.idle) if known else (None, None)
        return cls(source, run, used.byte_seconds, used.held, idle, used.waited)


def _span(_: click.Context, __: click.Parameter, text: str) -> int:
    """Return the seconds of a duration such as `90m`, `12h` or `7d`."""
    match = _SPAN.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a length of time: write it as 90m, 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


def _by(_: click.Context, __: click.Parameter, text: str) -> str:
    """Return the name of a property by which the store can group tenants. Raise BadParameter for other names."""
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
    minutes (of an hour or a day where old use is merged), and the last half
    minute may be missing. SOURCE of GPU TIME:
      turns   measured by the gatekeeper
      nvml    sampled by NVML, for tenants that do not take turns
      none    unknown: NVML does not report this time
    HELD is the time with memory on a device. IDLE is the part of HELD in
    which the tenant used less than 1 % of the device's time.
    """
    if os.geteuid():
        fail("`fgpu usage` needs root on the host: use sudo", 1)
    start = time.time() - since
    try:
        found, begin = usage_store.grouped(usage_store.read(start), by), usage_store.begin()
    except usage_store.StoreError as error:
        fail(str(error), 1)
    if begin is not None and begin > start:
        click.echo(f"the store begins at {time.strftime('%F %R', time.localtime(begin))}", err=True)
    rows = sorted(
        ((group, source, used) for group, of in found.items() for source, used in of.items()),
        key=lambda row: (-row[2].run, -row[2].byte_seconds, row[0]),
    )
    records = [(group, UsageRow.of(source, used)) for group, source, used in rows]
    if as_json:
        click.echo(json.dumps([{by: group} | asdict(row) for group, row in records]))
    elif as_csv:
        click.echo(_csv(by, records), nl=False)
    else:
        from fgpu_ebpf.cli import tables

        click.echo(tables.usage(by, [(group or "-", row.source, *_hours(row)) for group, row in records]), nl=False)


def _hours(row: UsageRow) -> tuple[str, ...]:
    gib = row.memory_byte_seconds / HOUR / 2**30
    run, held, idle, waited = (
        "-" if seconds is None else f"{seconds / HOUR:.2f}"
        for seconds in (row.run_seconds, row.held_seconds, row.idle_seconds, row.waited_seconds)
    )
    return run, f"{gib:.2f}", held, idle, waited


def _csv(by: str, records: Sequence[tuple[str, UsageRow]]) -> str:
    """Return the rows as CSV. A value that was not measured is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [by, *(field.name for field in fields(UsageRow))])
    writer.writeheader()
    writer.writerows({by: group} | asdict(row) for group, row in records)
    return out.getvalue()
