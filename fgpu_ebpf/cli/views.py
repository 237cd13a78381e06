"""`fgpu status`, `ps`, `top`, `explain`, `events` and `metrics`: the state of the host; `fgpu schema`: its JSON.

This module runs in the process of the command, which prints the agent's answer. The exit codes are 0 (done), 1 (a
failure), 2 (wrong usage), 3 (no agent) and 4 (no such target).
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import click

from fgpu_ebpf import control_client
from fgpu_ebpf.cli.help_texts import TOP_KEYS, TOP_WORDS, also, examples, lines, target
from fgpu_ebpf.cli.request import NO_TARGET, call, did_you_mean, fail, no_answer, run_dir, say
from fgpu_ebpf.linux import printable

FOLLOW_SECONDS = 0.3
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SORTS = ("tenant", "gpu", "limit", "used", "peak", "share", "entitled", "waited", "refused", "held")


@examples("fgpu status", "fgpu status --json | jq .devices")
@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the whole state of the host as one JSON object.")
def status(as_json: bool) -> None:
    """Show tenants: limit, used, peak, refused."""
    from fgpu_ebpf.cli import tables

    snapshot = call({"verb": "snapshot"})
    click.echo(json.dumps(snapshot) if as_json else tables.status(snapshot), nl=as_json)


@examples("fgpu ps", "fgpu ps --all")
@click.command()
@click.option("--all", "is_all", is_flag=True, help="Also show processes outside tenants, with their cgroups.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list of processes.")
def ps(is_all: bool, as_json: bool) -> None:
    """Show the processes of tenants and the bytes charged to each process."""
    from fgpu_ebpf.cli import tables
    from fgpu_ebpf.snapshot import plain

    snapshot = call({"verb": "snapshot"})
    rows = tables.process_rows(snapshot) + (tables.unmanaged_rows(snapshot) if is_all else [])
    click.echo(json.dumps(rows, default=plain) if as_json else tables.processes(rows), nl=as_json)


@examples("fgpu top --filter team-a", "fgpu top -1 --sort refused")
@click.command()
@click.option(
    "-1", "--once", is_flag=True, help="Print once and exit; the default unless input and output are terminals."
)
@click.option("--sort", type=click.Choice(SORTS), default="used", show_default=True, help="The column to sort by.")
@click.option("--reverse", is_flag=True, help="Reverse the order.")
@click.option(
    "--filter", "filter_", default="", help="Only tenants with this text in name, path, policy, kind or enforcement."
)
@also(f"{lines(TOP_WORDS)}\n\n{lines(TOP_KEYS)}")
def top(once: bool, sort: str, reverse: bool, filter_: str) -> None:
    """Show devices and tenants, sorted, updated once a second."""
    from fgpu_ebpf.api.ranking import BY_WORD, Order
    from fgpu_ebpf.cli import top as terminal
    from fgpu_ebpf.cli.top_input import ViewChoice

    choice, folder = ViewChoice(Order(BY_WORD[sort], reverse), filter_), run_dir()

    def ask() -> Any:  # also called by another thread
        return control_client.call(folder, {"verb": "snapshot"})

    try:
        if once or not terminal.is_watched():
            terminal.print_once(ask, choice)
        else:
            sys.exit(terminal.watch(ask, choice))
    except ConnectionError as error:
        fail(no_answer(error), 3)
    except control_client.RequestError as error:
        fail(str(error), error.code)


@examples("fgpu explain alice", "fgpu explain pod/default/jupyter-0")
@click.command("explain")
@target
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def explain_target(target: str, as_json: bool) -> None:
    """Explain the limits of TARGET: the policy that decides, the limits in force, and stronger enforcement."""
    answer = call({"verb": "explain", "target": target})
    lines = answer.pop("lines")
    if as_json:
        click.echo(json.dumps(answer))
        return
    for line in lines:
        click.echo(printable.line(line))


def _seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Return the seconds of a length of time such as `90s` or `10m`. Raise BadParameter for other texts."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", value.strip()) if value else None
    if value and not match:
        raise click.BadParameter(f"{value!r} is not a length of time: write it as 90s, 10m, 2h or 1d")
    return float(match[1]) * _UNIT_SECONDS[match[2]] if match else None


@examples("fgpu events --since 10m --tenant alice", "fgpu events -f --json")
@click.command()
@click.option("-f", "--follow", is_flag=True, help="Print new events until interrupted, across restarts of the agent.")
@click.option("--since", metavar="DURATION", callback=_seconds, help="Maximum age of the events, e.g. 10m, 2h or 1d.")
@click.option("--tenant", default="", help="Only events of the tenant with this name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def events(follow: bool, since: float | None, tenant: str, as_json: bool) -> None:
    """Show refusals, bypasses, adoptions, kills, overruns, reloads and limits set by hand.

    The agent keeps its last 1,000 events until it exits.
    """
    from fgpu_ebpf.cli import tables
    from fgpu_ebpf.cli.event_feed import EventFeed

    feed = EventFeed(run_dir(), time.time() - since if since else 0.0)
    try:
        found = feed.begin()
    except ConnectionError as error:
        fail(no_answer(error), 3)
    except control_client.RequestError as error:
        fail(str(error), error.code)
    if tenant and not any(event["tenant"] == tenant for event in found):
        _check_name(tenant)
    while True:
        for event in found:
            if not tenant or event["tenant"] == tenant:
                click.echo(json.dumps(event) if as_json else tables.event_line(event))
        if not follow:
            return
        time.sleep(FOLLOW_SECONDS)
        found = feed.more(lambda said: say(f"fgpu: {said}", err=True))


def _check_name(tenant: str) -> None:
    """Exit with NO_TARGET if no tenant of this name exists."""
    if all(found["tenant"] != tenant for found in call({"verb": "snapshot"})["tenants"]):
        fail(f"no tenant and no event has the name {tenant!r}{did_you_mean(tenant)}", NO_TARGET)


@examples("fgpu metrics", "fgpu metrics | grep refused")
@click.command()
def metrics() -> None:
    """Print the metrics in Prometheus' text format."""
    click.echo(call({"verb": "metrics"}), nl=False)


@examples("fgpu schema status", "fgpu schema ps >ps.json")
@click.command()
@click.argument("command", type=click.Choice(("status", "ps", "usage", "events")))
def schema(command: str) -> None:
    """Print the JSON Schema of COMMAND's output with --json. For `events`, the schema describes one line."""
    from fgpu_ebpf.cli import output_schema

    click.echo(json.dumps(output_schema.of(command), indent=2))
