"""The command `fgpu`.

Owns: words, tables and exit codes: 0 done, 1 finding or failure, 2 usage, 3 no agent, 4 no such target. Never: decides
anything; the agent does. `fgpu run` answers 125 for every failure of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import fgpu_ebpf
from fgpu_ebpf import control
from fgpu_ebpf.checks import Check
from fgpu_ebpf.cli_completion import completion, tenants
from fgpu_ebpf.cli_containers import cdi_group, setup
from fgpu_ebpf.cli_kubernetes import device_plugin
from fgpu_ebpf.cli_policy import policy

RUN_DIR = Path("/run/fgpu")
FOLLOW_SECONDS = 0.3
SORTS = ("tenant", "gpu", "limit", "used", "peak", "share", "entitled", "waited", "refused", "held")


def _fail(text: str, code: int) -> None:
    click.echo(f"fgpu: {text}", err=True)
    sys.exit(code)


def _no_answer(error: ConnectionError) -> str:
    return f"{error}: {error.fix}" if isinstance(error, control.NoAnswerError) else str(error)


def _call(request: dict[str, Any], code_without_agent: int = 3) -> Any:
    try:
        return control.call(RUN_DIR, request)
    except ConnectionError as error:
        return _fail(_no_answer(error), code_without_agent)
    except control.RequestError as error:
        return _fail(str(error), error.code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fgpu_ebpf.__version__, prog_name="fgpu")
@click.option("--run-dir", type=click.Path(path_type=Path), default=RUN_DIR, show_default=True, hidden=True)
def main(run_dir: Path) -> None:
    """Shares NVIDIA GPUs between containers, with hard memory limits kept by the kernel."""
    global RUN_DIR
    RUN_DIR = run_dir


# -- the service ---------------------------------------------------------------------------------------------------


@main.command()
@click.option("--driver-root", type=click.Path(path_type=Path), help="Where the NVIDIA driver's libraries are: /.")
@click.option("--shim", type=click.Path(path_type=Path), help="The shim's file, if not the package's own.")
@click.option("--listen", help="Address of the status page (/) and /metrics: 127.0.0.1:9423.")
@click.option("--loader", help="The interpreter that sees BCC: /usr/bin/python3 -I.")
@click.option("--config", type=click.Path(path_type=Path), help="The host's settings: /etc/fgpu/agent.yaml.")
@click.option("--policies", type=click.Path(path_type=Path), help="The folder of policies: /etc/fgpu/policy.d.")
@click.option("--pins", type=click.Path(path_type=Path), hidden=True)
@click.option("--store", type=click.Path(path_type=Path), hidden=True)
@click.option("--skip-check", "skipped", multiple=True, hidden=True)
@click.option("--log-format", type=click.Choice(["text", "json", "journal"]), help="text; journal under systemd.")
def agent(log_format: str | None, **options: Any) -> None:
    """Enforce limits on this host: loader, gatekeeper and agent."""

    from fgpu_ebpf import journal, service
    from fgpu_ebpf.start_checks import AgentError

    journal.configure(journal.Format(log_format) if log_format else None)
    try:
        service.serve(service.Options(RUN_DIR, **{name: value for name, value in options.items() if value}))
    except AgentError as error:
        _fail(str(error), 1)


@main.command()
@click.option("--loader", help="The interpreter that sees BCC: /usr/bin/python3 -I.")
@click.option("--config", type=click.Path(path_type=Path), help="The host's settings: /etc/fgpu/agent.yaml.")
def load(**options: Any) -> None:
    """Compile and pin the kernel's programs, and end: what an agent begins with where nobody has."""
    from fgpu_ebpf import service
    from fgpu_ebpf.programs import ProgramError
    from fgpu_ebpf.start_checks import AgentError

    try:
        click.echo(service.load(service.Options(RUN_DIR, **{name: value for name, value in options.items() if value})))
    except (AgentError, ProgramError, OSError) as error:
        _fail(str(error), 1)


@main.command()
@click.option("--driver-root", type=click.Path(path_type=Path), help="If not the agent's, or the host's settings'.")
@click.option("--loader", help="If not the agent's, or the host's settings'.")
@click.option("--config", type=click.Path(path_type=Path), help="The host's settings: /etc/fgpu/agent.yaml.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def doctor(as_json: bool, **options: Any) -> None:
    """Check this host: what is missing, and what mends it."""
    from fgpu_ebpf import service

    checks = service.checks(service.Options(RUN_DIR, **{name: value for name, value in options.items() if value}))
    if as_json:
        click.echo(json.dumps([{"name": c.name, "ok": c.ok, "found": c.found, "mend": c.mend} for c in checks]))
    else:
        for check in checks:
            click.echo(_check_line(check))
    sys.exit(0 if all(c.ok for c in checks) else 1)


def _check_line(check: Check) -> str:
    if check.ok:
        return f"ok    {check.name}: {check.found}"
    return f"FAIL  {check.name}: {check.found}\n      mend: {check.mend}"


@main.command()
def detach() -> None:
    """Open everything, take away what was pinned and set up, end the agent."""
    from fgpu_ebpf import workloads

    try:
        control.call(RUN_DIR, {"verb": "detach"})
    except ConnectionError as error:
        if isinstance(error, control.NoAnswerError) and error.denied:
            _fail(_no_answer(error), 3)
        from fgpu_ebpf import service

        try:
            service.take_away(RUN_DIR)
        except OSError as error:
            _fail(f"cannot detach: {error}", 1)
    except control.RequestError as error:
        _fail(str(error), error.code)
    workloads.remove_run_folder()


def _limits(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what a tenant gets; the agent wants one at least."""
    for option in (
        click.option("--priority", type=click.Choice(["high", "normal", "low"]), help="Whose turn comes first."),
        click.option("--weight", type=int, help="Part of contended time: 100 is usual."),
        click.option("--compute", help="Ceiling of each device's time, e.g. 50%."),
        click.option("--memory", help="Limit on each device, e.g. 8GiB or 50%."),
        click.option(
            "--device", "devices", multiple=True, help="The only GPU to have, by index or UUID; several times."
        ),
    ):
        command = option(command)
    return command


def _limit_text(name: str, value: Any) -> str:
    if name == "devices":
        return f"device {', '.join(value)}"
    return str(value) if name == "memory" else f"{name} {value}"


# -- tenants -------------------------------------------------------------------------------------------------------


class _Run(click.Command):
    """125 for wrong usage too: 2 may be the command's own answer."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """As always, but for the exit code."""
        try:
            return super().make_context(*args, **more)
        except click.UsageError as error:
            error.show()
            sys.exit(125)


@main.command(cls=_Run, context_settings={"ignore_unknown_options": True})
@_limits
@click.option("--name", default="", help="The tenant's name; run-N else.")
@click.option("--pidns", is_flag=True, help="In a pid namespace of its own.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(name: str, pidns: bool, command: tuple[str, ...], **limits: Any) -> None:
    """Run COMMAND as a tenant, without a container."""
    from fgpu_ebpf import launch

    try:
        answer = control.call(RUN_DIR, {"verb": "run", "name": name, **limits})
        place = launch.Place(Path(answer["folder"]), Path(answer["preload"]), pidns)
        sys.exit(launch.run(place, command))
    except ConnectionError as error:
        _fail(f"not started: {_no_answer(error)}", 125)
    except (control.RequestError, launch.LaunchError) as error:
        _fail(f"{error}: not started", 125)


@main.command("set")
@click.argument("target", shell_complete=tenants)
@_limits
def set_limits(target: str, **limits: Any) -> None:
    """Put limits in force on TARGET: a tenant's name, /cgroup/path or pid/N."""
    done = _call({"verb": "put", "target": target, **limits})
    click.echo(f"{done['tenant']}: {', '.join(_limit_text(*limit) for limit in limits.items() if limit[1])}")


@main.command()
@click.argument("target", shell_complete=tenants)
def unset(target: str) -> None:
    """Take TARGET's limit away."""
    _call({"verb": "drop", "target": target})


@main.group()
def device() -> None:
    """Say what only an operator knows of a device."""


@device.command()
@click.argument("gpu")
def clear(gpu: str) -> None:
    """Offer GPU (an index or a UUID) again: it was repaired after the XID that it has reported."""
    _call({"verb": "clear", "device": gpu})


@main.command()
@click.option("--json", "as_json", is_flag=True, help="The whole Snapshot.")
def status(as_json: bool) -> None:
    """Show tenants: limit, used, peak, refused."""
    from fgpu_ebpf import tables

    snapshot = _call({"verb": "snapshot"})
    click.echo(json.dumps(snapshot) if as_json else tables.status(snapshot), nl=as_json)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A list of processes.")
def ps(as_json: bool) -> None:
    """Show the tenants' processes and what each is charged."""
    from fgpu_ebpf import tables

    rows = tables.process_rows(_call({"verb": "snapshot"}))
    click.echo(json.dumps(rows) if as_json else tables.processes(rows), nl=as_json)


@main.command()
@click.option("-1", "--once", is_flag=True, help="One pass; so it is too where the output goes to no terminal.")
@click.option("--sort", type=click.Choice(SORTS), default="used", show_default=True, help="By which column.")
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option("--filter", "filter_", default="", help="What the name, path, policy or enforcement has in it.")
def top(once: bool, sort: str, reverse: bool, filter_: str) -> None:
    """Watch devices and tenants, sorted, once a second.

    \b
    The bar of a device: what tenants hold (█), what others hold (▒), what is promised to tenants beyond (░).
    SHARE and ENTITLED are of the device's time, in the last half second.

    \b
    t g l u p s e w r h       sort by the column that begins so; again: the other way round
    /                         filter; Enter keeps it, Esc clears it
    up down j k, PgUp PgDn    scroll; so do Space, Home, End
    q, Ctrl-C                 quit
    """
    from fgpu_ebpf import top as terminal
    from fgpu_ebpf.choice import Choice
    from fgpu_ebpf.ranking import BY_WORD, Order

    choice = Choice(Order(BY_WORD[sort], reverse), filter_)

    def ask() -> Any:
        return control.call(RUN_DIR, {"verb": "snapshot"})

    try:
        if once or not terminal.is_watched():
            terminal.print_once(ask, choice)
        else:
            sys.exit(terminal.watch(ask, choice))
    except ConnectionError as error:
        _fail(_no_answer(error), 3)
    except control.RequestError as error:
        _fail(str(error), error.code)


@main.command("explain")
@click.argument("target", shell_complete=tenants)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def explain_target(target: str, as_json: bool) -> None:
    """Say why TARGET gets what it gets, and what would hold it better."""
    answer = _call({"verb": "explain", "target": target})
    lines = answer.pop("lines")
    click.echo(json.dumps(answer) if as_json else "\n".join(lines))


@main.command()
@click.option("-f", "--follow", is_flag=True, help="Go on as they happen.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def events(follow: bool, as_json: bool) -> None:
    """Show refusals, bypasses, adoptions, kills, overruns, reloads and limits set by hand."""
    from fgpu_ebpf import tables

    since = 0
    while True:
        answer = _call({"verb": "events", "since": since})
        for happening in answer["events"]:
            click.echo(json.dumps(happening) if as_json else tables.happening(happening))
        since = answer["last"]
        if not follow:
            return
        time.sleep(FOLLOW_SECONDS)


@main.command()
def reload() -> None:
    """Read the policy files again, as the agent does by itself when they change."""
    _call({"verb": "reload"})


@main.command()
def metrics() -> None:
    """Print the metrics in Prometheus' text format."""
    click.echo(_call({"verb": "metrics"}), nl=False)


main.add_command(completion)
main.add_command(policy)
main.add_command(cdi_group)
main.add_command(setup)
main.add_command(device_plugin)

if __name__ == "__main__":
    os.umask(0o022)
    main()
