"""`fgpu status`, `ps`, `top`, `explain`, `events` and `metrics`: what the agent knows.

This module runs in the process of the command, which prints the agent's answer. Exit codes: 0 done, 1 failure, 2 wrong
usage, 3 no agent, 4 no such target.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

from fgpu_ebpf import control_client
from fgpu_ebpf.cli import help_texts
from fgpu_ebpf.cli.request import call, fail, no_answer, run_dir

FOLLOW_SECONDS = 0.3
SORTS = ("tenant", "gpu", "limit", "used", "peak", "share", "entitled", "waited", "refused", "held")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the whole Snapshot.")
def status(as_json: bool) -> None:
    """Show tenants: limit, used, peak, refused."""
    from fgpu_ebpf.cli import tables

    snapshot = call({"verb": "snapshot"})
    click.echo(json.dumps(snapshot) if as_json else tables.status(snapshot), nl=as_json)


@click.command()
@click.option("--all", "is_all", is_flag=True, help="Also processes outside tenants, with their cgroups.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list of processes.")
def ps(is_all: bool, as_json: bool) -> None:
    """Show the processes of tenants and the bytes charged to each."""
    from fgpu_ebpf.cli import tables

    snapshot = call({"verb": "snapshot"})
    rows = tables.process_rows(snapshot) + (tables.unmanaged_rows(snapshot) if is_all else [])
    click.echo(json.dumps(rows) if as_json else tables.processes(rows), nl=as_json)


@click.command()
@click.option("-1", "--once", is_flag=True, help="Print once and exit; the default if the output is not a terminal.")
@click.option("--sort", type=click.Choice(SORTS), default="used", show_default=True, help="The column to sort by.")
@click.option("--reverse", is_flag=True, help="Reverse the order.")
@click.option("--filter", "filter_", default="", help="Text in the name, path, policy or enforcement.")
def top(once: bool, sort: str, reverse: bool, filter_: str) -> None:
    """Show devices and tenants, sorted, updated once a second.

    \b
    A device's bar: memory held by tenants (█), held by others (▒), committed to tenants beyond that (░).
    SHARE and ENTITLED are parts of the device's time in the last half second.

    \b
    t g l u p s e w r h       sort by the column with this first letter; press again to reverse
    /                         filter; Enter keeps the filter, Esc clears it
    up down j k, PgUp PgDn    scroll; also Space, Home, End
    q, Ctrl-C                 quit
    """
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


@click.command("explain")
@help_texts.target
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def explain_target(target: str, as_json: bool) -> None:
    """Explain the limits of TARGET: the policy that decides, the limits in force, and how to enforce them better."""
    answer = call({"verb": "explain", "target": target})
    lines = answer.pop("lines")
    click.echo(json.dumps(answer) if as_json else "\n".join(lines))


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Print new events until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def events(follow: bool, as_json: bool) -> None:
    """Show refusals, bypasses, adoptions, kills, overruns, reloads and limits set by hand."""
    from fgpu_ebpf.cli import tables

    since = 0
    while True:
        answer = call({"verb": "events", "since": since})
        for event in answer["events"]:
            click.echo(json.dumps(event) if as_json else tables.event_line(event))
        since = answer["last"]
        if not follow:
            return
        time.sleep(FOLLOW_SECONDS)


@click.command()
def metrics() -> None:
    """Print the metrics in Prometheus' text format."""
    click.echo(call({"verb": "metrics"}), nl=False)


COMMANDS = (status, ps, top, explain_target, events, metrics)
