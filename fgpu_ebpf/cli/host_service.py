"""The part of `fgpu setup` for the host, which starts the agent's service, checks the host, and undoes the start.

This module runs in the process of the command. A file beside the states of the engines records the changes of the setup
to the service. Without systemd, nothing is started, and `fgpu doctor` prints the command that starts the agent.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import click

from fgpu_ebpf import control_client
from fgpu_ebpf.cli.request import say
from fgpu_ebpf.control_client import UNIT

UNITS = (UNIT, "fgpu-gatekeeper", "fgpu-parker.socket", "fgpu-parker")
_NOTE = "service"  # holds the arguments of the `systemctl` that undoes the start


def start(run_dir: Path, states: Path) -> bool:
    """Enable and start the service, and record the start in the folder `states`. Return False if the start fails."""
    if not control_client.has_unit():
        return True
    is_enabled, is_active = _is("enabled"), _is("active")
    if is_active and is_enabled:
        click.echo(f"{UNIT}: nothing to do")
        return True
    if not is_active and _answers(run_dir):
        click.echo(f"{UNIT}: not started, because an agent runs already")
        return True
    if not is_enabled:  # recorded first, because the start can take minutes and be interrupted
        states.mkdir(parents=True, exist_ok=True)
        (states / _NOTE).write_text("disable" if is_active else "disable --now", encoding="ascii")
    done = subprocess.run(["systemctl", "enable", "--now", UNIT], capture_output=True, text=True, check=False)
    said = f"does not start: {done.stderr.strip()}" if done.returncode else "enabled and started"
    click.echo(f"{UNIT}: {said}")
    return done.returncode == 0


def read_policies(run_dir: Path) -> None:
    """Put the policy files in force if an agent runs. `fgpu doctor` reports errors in these files."""
    with contextlib.suppress(ConnectionError, control_client.RequestError):
        control_client.call(run_dir, {"verb": "reload"})


def check(run_dir: Path) -> bool:
    """Print the failed checks of `fgpu doctor`. Return False if a check has failed."""
    from fgpu_ebpf import doctor
    from fgpu_ebpf.agent.settings import Options
    from fgpu_ebpf.cli.service import check_line

    checks = doctor.checks(Options(run_dir))
    wrong = [check for check in checks if not check.ok]
    for found in wrong:
        say(check_line(found))
    if not wrong:
        click.echo(f"doctor: all {len(checks)} checks are ok")
    return not wrong


def stop(run_dir: Path, states: Path) -> None:
    """Undo start(), unless another engine is set up, or policies or limits are in force.

    A service that start() has started is stopped and detached. If no agent answers, the service is kept if the folder
    of policies has a file, because an agent may be starting; limits of the kernel stay in force.
    """
    note = states / _NOTE
    if not note.exists() or any(states.glob("*.json")):
        return
    from fgpu_ebpf import daemon
    from fgpu_ebpf.cli import service

    used, has_answered = _needed(run_dir, states)
    if used:
        click.echo(f"{UNIT}: kept: {used}")
        return
    undoing = note.read_text("ascii").split()
    subprocess.run(["systemctl", *undoing, *UNITS], capture_output=True, check=False)
    said = "disabled"
    if "--now" in undoing and not has_answered and daemon.is_pinned():
        said += "; no agent answered: `fgpu detach` removes limits that the kernel may have"
    elif "--now" in undoing:
        service.detached()  # else programs that start in running containers would wait for an agent, and get no memory
    note.unlink()
    click.echo(f"{UNIT}: {said}")


def _needed(run_dir: Path, states: Path) -> tuple[str, bool]:
    """Return the reason why the agent is still needed, or an empty text, and whether an agent has answered."""
    with contextlib.suppress(ConnectionError):
        return _used(run_dir), True
    parked = _parked(run_dir)  # waits for an agent that starts
    with contextlib.suppress(ConnectionError):
        return parked or _used(run_dir), True
    return _policies(states), False


def _parked(run_dir: Path) -> str:
    """Wake parked tenants, and return why the agent is still needed: without an agent, no other program wakes them."""
    from fgpu_ebpf.cli.parking import still_parked

    parked = still_parked(run_dir)
    return parked and f"there are parked tenants: {parked}"


def _policies(states: Path) -> str:
    """Return why the next agent is needed: it would read policies. An empty text means that there are no policies."""
    from fgpu_ebpf.agent import host_config
    from fgpu_ebpf.containers import first_policy

    host, errors = host_config.read()
    if host is None:
        return "; ".join(map(str, errors))
    return f"{host.policy_folder} has policies" if first_policy.others(host.policy_folder, states) else ""


def _used(run_dir: Path) -> str:
    """Reload the policies, and return the reason why the agent is still needed, or an empty text.

    Raise ConnectionError if no agent answers.
    """
    try:
        policies = control_client.call(run_dir, {"verb": "reload"})["policies"]
        tenants = control_client.call(run_dir, {"verb": "snapshot"})["tenants"]
    except control_client.RequestError as error:
        return str(error)
    if policies:
        return f"there {'is 1 policy' if policies == 1 else f'are {policies} policies'} in force"
    names = ", ".join(tenant["tenant"] for tenant in tenants[:3])
    return f"there are limits (`fgpu detach` removes them): {names}" if tenants else ""


def _is(state: str) -> bool:
    return subprocess.run(["systemctl", "--quiet", f"is-{state}", UNIT], check=False).returncode == 0


def _answers(run_dir: Path) -> bool:
    try:
        control_client.call(run_dir, {"verb": "ping"})
    except (ConnectionError, control_client.RequestError):
        return False
    return True
