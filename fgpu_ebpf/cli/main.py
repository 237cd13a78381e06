"""The command `fgpu`: its subcommands, their options and exit codes.

Exit codes: 0 done, 1 a finding or failure, 2 wrong usage, 3 no agent, 4 no such target. `fgpu run` exits with 125 for
every failure of its own. Except for `fgpu agent`, a command sends its request to the agent over the control socket and
prints the reply.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import fgpu_ebpf
from fgpu_ebpf import control_client
from fgpu_ebpf.check import Check
from fgpu_ebpf.cli.completion import completion, tenants
from fgpu_ebpf.cli.containers import cdi_group, setup
from fgpu_ebpf.cli.kubernetes import device_plugin
from fgpu_ebpf.cli.policy import policy

RUN_DIR = Path("/run/fgpu")
FOLLOW_SECONDS = 0.3
SORTS = ("tenant", "gpu", "limit", "used", "peak", "share", "entitled", "waited", "refused", "held")


def _fail(text: str, code: int) -> None:
    click.echo(f"fgpu: {text}", err=True)
    sys.exit(code)


def _no_answer(error: ConnectionError) -> str:
    return f"{error}: {error.fix}" if isinstance(error, control_client.NoAnswerError) else str(error)


def _call(request: dict[str, Any], code_without_agent: int = 3) -> Any:
    try:
        return control_client.call(RUN_DIR, request)
    except ConnectionError as error:
        return _fail(_no_answer(error), code_without_agent)
    except control_client.RequestError as error:
        return _fail(str(error), error.code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fgpu_ebpf.__version__, prog_name="fgpu")
@click.option("--run-dir", type=click.Path(path_type=Path), default=RUN_DIR, show_default=True, hidden=True)
def main(run_dir: Path) -> None:
    """Share NVIDIA GPUs between containers, with hard memory limits enforced by the kernel."""
    global RUN_DIR
    RUN_DIR = run_dir


# -- the service ---------------------------------------------------------------------------------------------------


@main.command()
@click.option("--driver-root", type=click.Path(path_type=Path), help="Root of the NVIDIA driver's libraries: /.")
@click.option("--shim", type=click.Path(path_type=Path), help="The shim's file, if not the package's.")
@click.option("--listen", help="Address of the web page (/) and /metrics: 127.0.0.1:9423.")
@click.option("--loader", help="The Python interpreter that can import BCC: /usr/bin/python3 -I.")
@click.option("--config", type=click.Path(path_type=Path), help="The host's settings: /etc/fgpu/agent.yaml.")
@click.option("--policies", type=click.Path(path_type=Path), help="The folder of policies: /etc/fgpu/policy.d.")
@click.option("--pins", type=click.Path(path_type=Path), hidden=True)
@click.option("--store", type=click.Path(path_type=Path), hidden=True)
@click.option("--skip-check", "skipped", multiple=True, hidden=True)
@click.option("--log-format", type=click.Choice(["text", "json", "journal"]), help="text, or journal under systemd.")
def agent(log_format: str | None, **options: Any) -> None:
    """Run the agent: enforce limits on this host. Starts the loader and the gatekeeper."""

    from fgpu_ebpf import daemon
    from fgpu_ebpf.agent.settings import Options
    from fgpu_ebpf.driver.start_checks import AgentError
    from fgpu_ebpf.linux import logs

    logs.configure(logs.Format(log_format) if log_format else None)
    try:
        daemon.serve(Options(RUN_DIR, **{name: value for name, value in options.items() if value}))
    except AgentError as error:
        _fail(str(error), 1)


@main.command()
@click.option("--loader", help="The Python interpreter that can import BCC: /usr/bin/python3 -I.")
@click.option("--config", type=click.Path(path_type=Path), help="The host's settings: /etc/fgpu/agent.yaml.")
def load(**options: Any) -> None:
    """Compile and pin the BPF programs, and exit. An agent does this at its start if they are not pinned."""
    from fgpu_ebpf import daemon
    from fgpu_ebpf.agent.settings import Options
    from fgpu_ebpf.driver.image import ProgramError
    from fgpu_ebpf.driver.start_checks import AgentError

    try:
        click.echo(daemon.load(Options(RUN_DIR, **{name: value for name, value in options.items() if value})))
    except (AgentError, ProgramError, OSError) as error:
        _fail(str(error), 1)


@main.command()
@click.option("--driver-root", type=click.Path(path_type=Path), help="Default: that of the agent or of the settings.")
@click.option("--loader", help="Default: that of the agent or of the settings.")
@click.option("--config", type=click.Path(path_type=Path), help="The host's settings: /etc/fgpu/agent.yaml.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def doctor(as_json: bool, **options: Any) -> None:
    """Check this host: what is missing, and how to fix it."""
    from fgpu_ebpf import doctor as host
    from fgpu_ebpf.agent.settings import Options

    checks = host.checks(Options(RUN_DIR, **{name: value for name, value in options.items() if value}))
    if as_json:
        rows = [{"name": c.name, "ok": c.ok, "found": c.found, "fix": c.mend, "mend": c.mend} for c in checks]
        click.echo(json.dumps(rows))
    else:
        for check in checks:
            click.echo(_check_line(check))
    sys.exit(0 if all(c.ok for c in checks) else 1)


def _check_line(check: Check) -> str:
    if check.ok:
        return f"ok    {check.name}: {check.found}"
    return f"FAIL  {check.name}: {check.found}\n      fix: {check.mend}"


@main.command()
def detach() -> None:
    """Open all gates, remove all limits, probes and set-up files, and stop the agent."""
    from fgpu_ebpf.workloads import cgroups

    try:
        control_client.call(RUN_DIR, {"verb": "detach"})
    except ConnectionError as error:
        if isinstance(error, control_client.NoAnswerError) and error.denied:
            _fail(_no_answer(error), 3)
        from fgpu_ebpf import daemon

        try:
            daemon.take_away(RUN_DIR)
        except OSError as error:
            _fail(f"cannot detach: {error}", 1)
    except control_client.RequestError as error:
        _fail(str(error), error.code)
    cgroups.remove_run_folder()


def _limits(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that set limits to a command. The agent requires at least one of them."""
    for option in (
        click.option("--priority", type=click.Choice(["high", "normal", "low"]), help="A higher priority runs first."),
        click.option("--weight", type=int, help="Part of contended time; the default is 100."),
        click.option("--compute", help="Ceiling of each device's time, e.g. 50%."),
        click.option("--memory", help="Limit on each device, e.g. 8GiB or 50%."),
        click.option(
            "--device", "devices", multiple=True, help="Allow only this GPU, by index or UUID; may be repeated."
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
    """Exits with 125 for wrong usage too, because 2 may be an exit code of the program that is run."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Parse the command line; exit with 125 if it is wrong."""
        try:
            return super().make_context(*args, **more)
        except click.UsageError as error:
            error.show()
            sys.exit(125)


@main.command(cls=_Run, context_settings={"ignore_unknown_options": True})
@_limits
@click.option("--name", default="", help="The tenant's name; default: run-N.")
@click.option("--pidns", is_flag=True, help="Run in a new pid namespace.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(name: str, pidns: bool, command: tuple[str, ...], **limits: Any) -> None:
    """Run COMMAND as a tenant, without a container."""
    from fgpu_ebpf.containers import run

    try:
        answer = control_client.call(RUN_DIR, {"verb": "run", "name": name, **limits})
        target = run.LaunchTarget(Path(answer["folder"]), Path(answer["preload"]), pidns)
        sys.exit(run.run(target, command))
    except ConnectionError as error:
        _fail(f"not started: {_no_answer(error)}", 125)
    except (control_client.RequestError, run.LaunchError) as error:
        _fail(f"{error}: not started", 125)


@main.command("set")
@click.argument("target", shell_complete=tenants)
@_limits
def set_limits(target: str, **limits: Any) -> None:
    """Set limits of TARGET: a tenant's name, /cgroup/path or pid/N."""
    done = _call({"verb": "put", "target": target, **limits})
    click.echo(f"{done['tenant']}: {', '.join(_limit_text(*limit) for limit in limits.items() if limit[1])}")


@main.command()
@click.argument("target", shell_complete=tenants)
def unset(target: str) -> None:
    """Remove the limits that were set for TARGET."""
    _call({"verb": "drop", "target": target})


@main.group()
def device() -> None:
    """Tell the agent about the state of a device."""


@device.command()
@click.argument("gpu")
def clear(gpu: str) -> None:
    """Offer GPU (an index or a UUID) again after the repair of the error that its XID reported."""
    _call({"verb": "clear", "device": gpu})


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the whole Snapshot.")
def status(as_json: bool) -> None:
    """Show tenants: limit, used, peak, refused."""
    from fgpu_ebpf.cli import tables

    snapshot = _call({"verb": "snapshot"})
    click.echo(json.dumps(snapshot) if as_json else tables.status(snapshot), nl=as_json)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list of processes.")
def ps(as_json: bool) -> None:
    """Show the processes of tenants and the bytes charged to each."""
    from fgpu_ebpf.cli import tables

    rows = tables.process_rows(_call({"verb": "snapshot"}))
    click.echo(json.dumps(rows) if as_json else tables.processes(rows), nl=as_json)


@main.command()
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

    choice = ViewChoice(Order(BY_WORD[sort], reverse), filter_)

    def ask() -> Any:
        return control_client.call(RUN_DIR, {"verb": "snapshot"})

    try:
        if once or not terminal.is_watched():
            terminal.print_once(ask, choice)
        else:
            sys.exit(terminal.watch(ask, choice))
    except ConnectionError as error:
        _fail(_no_answer(error), 3)
    except control_client.RequestError as error:
        _fail(str(error), error.code)


@main.command("explain")
@click.argument("target", shell_complete=tenants)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def explain_target(target: str, as_json: bool) -> None:
    """Explain the limits of TARGET: the policy that decides, the limits in force, and how to enforce them better."""
    answer = _call({"verb": "explain", "target": target})
    lines = answer.pop("lines")
    click.echo(json.dumps(answer) if as_json else "\n".join(lines))


@main.command()
@click.option("-f", "--follow", is_flag=True, help="Print new events until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def events(follow: bool, as_json: bool) -> None:
    """Show refusals, bypasses, adoptions, kills, overruns, reloads and limits set by hand."""
    from fgpu_ebpf.cli import tables

    since = 0
    while True:
        answer = _call({"verb": "events", "since": since})
        for event in answer["events"]:
            click.echo(json.dumps(event) if as_json else tables.event_line(event))
        since = answer["last"]
        if not follow:
            return
        time.sleep(FOLLOW_SECONDS)


@main.command()
def reload() -> None:
    """Read the policy files again. The agent reads them automatically when they change."""
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
