"""The command `fgpu`.

Owns: words, tables and exit codes: 0 done, 1 finding or failure, 2 usage, 3 no agent, 4 no such target. Never: decides
anything; the agent does. `fgpu run` answers 125 for every failure of its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

import fgpu_ebpf
from fgpu_ebpf.checks import Check

RUN_DIR = Path("/run/fgpu")


def _fail(text: str, code: int) -> None:
    click.echo(f"fgpu: {text}", err=True)
    sys.exit(code)


def _call(request: dict[str, Any], code_without_agent: int = 3) -> Any:
    from fgpu_ebpf import server

    try:
        return server.call(RUN_DIR, request)
    except ConnectionError as error:
        return _fail(f"{error}: start it with `fgpu agent`", code_without_agent)
    except server.RequestError as error:
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
@click.option(
    "--driver-root",
    type=click.Path(path_type=Path),
    default=Path("/"),
    show_default=True,
    help="Where the NVIDIA driver's libraries are.",
)
@click.option("--shim", type=click.Path(path_type=Path), help="The shim's file, if not the package's own.")
@click.option("--listen", default="127.0.0.1:9423", show_default=True, help="Address of /metrics.")
@click.option("--loader", default="/usr/bin/python3 -I", show_default=True, help="The interpreter that sees BCC.")
@click.option("--pins", type=click.Path(path_type=Path), hidden=True)
def agent(driver_root: Path, shim: Path | None, listen: str, loader: str, pins: Path | None) -> None:
    """Enforce limits on this host: loader, gatekeeper and agent."""
    from fgpu_ebpf import service
    from fgpu_ebpf.agent import AgentError

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        service.serve(RUN_DIR, driver_root, shim, listen, loader, pins)
    except AgentError as error:
        _fail(str(error), 1)


@main.command()
@click.option("--driver-root", type=click.Path(path_type=Path), default=Path("/"), show_default=True)
@click.option("--loader", default="/usr/bin/python3 -I", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def doctor(driver_root: Path, loader: str, as_json: bool) -> None:
    """Check this host: what is missing, and what mends it."""
    from fgpu_ebpf import service

    checks = service.checks(RUN_DIR, driver_root, loader)
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
    from fgpu_ebpf import server, service

    try:
        server.call(RUN_DIR, {"verb": "detach"})
    except ConnectionError:
        try:
            service.take_away(RUN_DIR)
        except OSError as error:
            _fail(f"cannot detach: {error}", 1)
    except server.RequestError as error:
        _fail(str(error), error.code)


# -- tenants -------------------------------------------------------------------------------------------------------


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--memory", required=True, help="Limit on each device, e.g. 8GiB.")
@click.option("--name", default="", help="The tenant's name; run-N else.")
@click.option("--pidns", is_flag=True, help="In a pid namespace of its own.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(memory: str, name: str, pidns: bool, command: tuple[str, ...]) -> None:
    """Run COMMAND as a tenant, without a container."""
    from fgpu_ebpf import launch, server

    try:
        answer = server.call(RUN_DIR, {"verb": "run", "memory": memory, "name": name})
        place = launch.Place(Path(answer["folder"]), Path(answer["preload"]), pidns)
        sys.exit(launch.run(place, command))
    except ConnectionError as error:
        _fail(f"{error}: not started", 125)
    except (server.RequestError, launch.LaunchError) as error:
        _fail(f"{error}: not started", 125)


@main.command("set")
@click.argument("target")
@click.option("--memory", required=True, help="Limit on each device, e.g. 8GiB.")
def set_limit(target: str, memory: str) -> None:
    """Put a limit in force on TARGET: a tenant's name, /cgroup/path or pid/N."""
    done = _call({"verb": "put", "target": target, "memory": memory})
    click.echo(f"{done['tenant']}: {memory}")


@main.command()
@click.argument("target")
def unset(target: str) -> None:
    """Take TARGET's limit away."""
    _call({"verb": "drop", "target": target})


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
def metrics() -> None:
    """Print the metrics in Prometheus' text format."""
    click.echo(_call({"verb": "metrics"}), nl=False)


if __name__ == "__main__":
    os.umask(0o022)
    main()
