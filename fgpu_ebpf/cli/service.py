"""`fgpu agent`, `load`, `doctor`, `detach` and `reload`: the service on this host.

This module runs in the process of the command. The exit codes are 0 (done), 1 (a finding or failure), 2 (wrong usage),
3 (no agent) and 5 (a tenant is still parked).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from fgpu_ebpf import control_client
from fgpu_ebpf.check import Check
from fgpu_ebpf.cli.help_texts import examples
from fgpu_ebpf.cli.parking import wake_all
from fgpu_ebpf.cli.request import call, fail, no_answer, run_dir, say

STARTING_SECONDS = 30.0  # an agent that starts or exits holds its lock without a socket for less than this time


@examples("fgpu agent", "fgpu agent --listen 127.0.0.1:9400 --log-format json")
@click.command()
@click.option(
    "--driver-root", type=click.Path(path_type=Path), help="Root of the NVIDIA driver's libraries (default: /)."
)
@click.option("--shim", type=click.Path(path_type=Path), help="Path of the shim (default: the package's file).")
@click.option("--listen", help="Address of the web page (/) and /metrics (default: 127.0.0.1:9423).")
@click.option("--loader", help="Python interpreter that can import BCC (default: /usr/bin/python3 -I).")
@click.option(
    "--config", type=click.Path(path_type=Path), help="File with the host's settings (default: /etc/fgpu/agent.yaml)."
)
@click.option("--policies", type=click.Path(path_type=Path), help="Folder of policies (default: /etc/fgpu/policy.d).")
@click.option("--pins", type=click.Path(path_type=Path), hidden=True)
@click.option("--store", type=click.Path(path_type=Path), hidden=True)
@click.option("--skip-check", "skipped", multiple=True, hidden=True)
@click.option(
    "--log-format", type=click.Choice(["text", "json", "journal"]), help="Default: journal under systemd, else text."
)
def agent(**options: Any) -> None:
    """Run the agent: enforce limits on this host.

    The agent starts the gatekeeper and, if the BPF programs are not pinned, the loader, which compiles them.
    """

    from fgpu_ebpf import daemon
    from fgpu_ebpf.agent.settings import Options
    from fgpu_ebpf.driver.start_checks import AgentError

    try:
        daemon.serve(Options(run_dir(), **{name: value for name, value in options.items() if value}))
    except AgentError as error:
        fail(str(error), 1)


@examples("fgpu load", "fgpu load --config /etc/fgpu/agent.yaml")
@click.command()
@click.option("--loader", help="Python interpreter that can import BCC (default: /usr/bin/python3 -I).")
@click.option(
    "--config", type=click.Path(path_type=Path), help="File with the host's settings (default: /etc/fgpu/agent.yaml)."
)
def load(**options: Any) -> None:
    """Compile and pin the BPF programs, and exit. An agent compiles missing programs at its start."""
    from fgpu_ebpf import daemon
    from fgpu_ebpf.agent.settings import Options
    from fgpu_ebpf.driver.image import ProgramError
    from fgpu_ebpf.driver.start_checks import AgentError

    try:
        click.echo(daemon.load(Options(run_dir(), **{name: value for name, value in options.items() if value})))
    except (AgentError, ProgramError, OSError) as error:
        fail(str(error), 1)


@examples("fgpu mps", "systemctl enable --now fgpu-mps")
@click.command()
def mps() -> None:
    """Run NVIDIA's MPS for devices with `sharing: concurrent`, until SIGTERM, as the service fgpu-mps does."""
    from fgpu_ebpf.driver import mps as daemon

    try:
        sys.exit(daemon.serve(run_dir()))
    except OSError as error:
        fail(f"MPS does not start: {error}", 1)


@examples("fgpu doctor", "fgpu doctor --json")
@click.command()
@click.option(
    "--driver-root",
    type=click.Path(path_type=Path),
    help="Root of the NVIDIA driver's libraries; default: the running agent's value, else the value in agent.yaml.",
)
@click.option(
    "--loader",
    help="Python interpreter that can import BCC; default: the running agent's value, else the value in agent.yaml.",
)
@click.option(
    "--config", type=click.Path(path_type=Path), help="File with the host's settings (default: /etc/fgpu/agent.yaml)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def doctor(as_json: bool, **options: Any) -> None:
    """Check this host, and print how to fix each problem."""
    from fgpu_ebpf import doctor as host
    from fgpu_ebpf.agent.settings import Options

    checks = host.checks(Options(run_dir(), **{name: value for name, value in options.items() if value}))
    if as_json:
        rows = [{"name": c.name, "ok": c.ok, "found": c.found, "fix": c.fix, "mend": c.fix} for c in checks]
        click.echo(json.dumps(rows))
    else:
        for check in checks:
            say(check_line(check))
    sys.exit(0 if all(c.ok for c in checks) else 1)


def check_line(check: Check) -> str:
    """Return a check as lines of `fgpu doctor`."""
    if check.ok:
        return f"ok    {check.name}: {check.found}"
    return f"FAIL  {check.name}: {check.found}\n      fix: {check.fix}"


@examples("fgpu detach", "fgpu detach --yes")
@click.command()
@click.option("--yes", is_flag=True, help="Skip the confirmation. Without a terminal, no confirmation is required.")
def detach(yes: bool) -> None:
    """Open all gates, remove all limits, probes and set-up files, and stop the agent.

    Parked tenants are woken first. If a tenant cannot be woken, nothing is removed, and the exit code is 5.
    """
    from fgpu_ebpf.workloads import cgroups

    if not yes and _is_terminal():
        _confirm()
    said = "limits, probes and set-up files of the agent are removed"
    if tenants := detached().get("tenants"):
        said = "1 tenant has lost its limit" if tenants == 1 else f"{tenants} tenants have lost their limits"
    cgroups.remove_run_folder()
    click.echo(f"detached: {said}")


def detached() -> dict[str, Any]:
    """Detach by a request to the agent, or in this process if no agent runs. Return the agent's answer.

    An agent that starts or exits holds its lock and has no socket, so the request and the removal are repeated. After
    STARTING_SECONDS, an agent that holds its lock and does not answer counts as hung.
    """
    until, parked_until = time.monotonic() + STARTING_SECONDS, 0.0
    while True:
        try:
            return control_client.call(run_dir(), {"verb": "detach"}) or {}  # the answer of an older version is null
        except ConnectionError as error:
            if isinstance(error, control_client.NoAnswerError) and error.denied:
                fail(no_answer(error), 3)
        except control_client.RequestError as error:
            parked_until = parked_until or time.monotonic() + STARTING_SECONDS
            if error.code != control_client.PARKED or time.monotonic() > parked_until:
                fail(str(error), error.code)
            wake_all()
            until = time.monotonic() + STARTING_SECONDS
            time.sleep(0.1)  # a tenant may be parked again, or may wake up because it no longer has a limit
            continue
        from fgpu_ebpf import daemon

        try:
            if daemon.take_away(run_dir(), hung=time.monotonic() > until):
                return {}
        except daemon.ParkedError as error:
            fail(f"nothing was removed, still parked: {error}", control_client.PARKED)
        except OSError as error:
            fail(f"cannot detach: {error}", 1)
        time.sleep(0.1)


def _is_terminal() -> bool:
    """Return whether a user at a terminal can read and answer a question."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _confirm() -> None:
    """Ask a user at a terminal before tenants lose their limits. Exit with 1 if the answer is no."""
    try:
        tenants = len(control_client.call(run_dir(), {"verb": "snapshot"})["tenants"])
    except (ConnectionError, control_client.RequestError):
        return  # no agent answers; if an agent runs, the request to detach will report the reason
    if tenants:
        loss = "1 tenant loses its limit" if tenants == 1 else f"{tenants} tenants lose their limits"
        click.confirm(f"{loss}. Detach?", abort=True, err=True)


@examples("fgpu reload", "fgpu policy check && fgpu reload")
@click.command()
def reload() -> None:
    """Read the policy files again. The agent reads changed files automatically."""
    done = call({"verb": "reload"})
    click.echo(f"reloaded: {done['policies']} {'policy' if done['policies'] == 1 else 'policies'} in force")
