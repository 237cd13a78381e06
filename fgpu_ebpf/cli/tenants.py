"""`fgpu run`, `set`, `unset` and `device`: change the limits of a tenant, and the state of devices.

This module runs in the process of the command, which sends a request to the agent. The exit codes are 0 (done), 1 (a
failure), 2 (wrong usage), 3 (no agent) and 4 (no such target). `fgpu run` exits with 125 for every failure of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from fgpu_ebpf import control_client
from fgpu_ebpf.cli.help_texts import Sections, examples, target
from fgpu_ebpf.cli.request import call, fail, no_answer, run_dir, say
from fgpu_ebpf.policy.units import memory_text

_RELEASE_SECONDS = 10.0  # longer than a pass of the agent's reconcile thread, unless NVML hangs


def _limits(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that set limits to a command. The agent requires at least one option besides --device."""
    for option in (
        click.option(
            "--priority", type=click.Choice(["high", "normal", "low"]), help="Tenants with a higher priority run first."
        ),
        click.option(
            "--priority-class",
            help="Priority by a name in `priorities` of agent.yaml; another name: the priority of the policy.",
        ),
        click.option("--weight", type=int, help="Weight when tenants compete for a device; the default is 100."),
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
    return str(value) if name == "memory" else f"{name.replace('_', ' ')} {value}"


class _Run(click.Command):
    """A command that exits with 125 for wrong usage, because 2 may be the exit code of the program that is run."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Parse the command line, and exit with 125 if the command line is wrong."""
        try:
            return super().make_context(*args, **more)
        except click.UsageError as error:
            error.show()
            sys.exit(125)


@examples("fgpu run --memory 8GiB -- python3 train.py", "fgpu run --memory 50% --compute 25% --name alice -- bash")
@click.command(cls=_Run, context_settings={"allow_interspersed_args": False})
@_limits
@click.option("--name", default="", help="The tenant's name; default: run-N.")
@click.option("--pidns", is_flag=True, help="Run in a new pid namespace.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(name: str, pidns: bool, command: tuple[str, ...], **limits: Any) -> None:
    """Run COMMAND as a tenant, without a container."""
    from fgpu_ebpf.containers import run

    try:
        answer = control_client.call(run_dir(), {"verb": "run", "name": name, **limits})
        target = run.LaunchTarget(Path(answer["folder"]), Path(answer["preload"]).parent, pidns)
        sys.exit(run.run(target, command))
    except ConnectionError as error:
        fail(f"not started: {no_answer(error)}", 125)
    except (control_client.RequestError, run.LaunchError) as error:
        fail(f"not started: {error}", 125)


@examples("fgpu set alice --memory 8GiB", "fgpu set unit/ollama.service --memory 50% --weight 200")
@click.command("set")
@target
@_limits
def set_limits(target: str, **limits: Any) -> None:
    """Set limits of TARGET. The limits hold immediately, until `fgpu unset` or the end of the cgroup."""
    from fgpu_ebpf.tenancy.enforcement import excess

    done = call({"verb": "put", "target": target, **limits})
    say(f"{done['tenant']}: {', '.join(_limit_text(*limit) for limit in limits.items() if limit[1])}")
    for device in (done.get("level") or {}).get("devices", ()):
        if over := excess(device):
            held = f"holds {memory_text(device['used_bytes'])} of {memory_text(device['limit_bytes'])}"
            say(f"{done['tenant']} {held} on gpu {device['gpu']}: {over}")


@examples("fgpu unset alice", "fgpu unset 3f1a9c")
@click.command()
@target
def unset(target: str) -> None:
    """Remove the limits that were set for TARGET by `fgpu set` or `fgpu run`."""
    done = call({"verb": "drop", "target": target})
    name = done.get("tenant") or done["path"]
    say(f"{name}: limits set by hand are removed; {_now(done.get('level'))}")


def _now(level: Mapping[str, Any] | None) -> str:
    """Return a text about a cgroup's limits after `unset`.

    `level`: the cgroup's innermost level, as in `fgpu explain`.
    """
    from fgpu_ebpf import abi

    if level is None:
        return "no limit is in force"
    limits = {limit for device in level["devices"] if (limit := abi.limit(device["limit_bytes"])) is not None}
    sizes = " and ".join(map(memory_text, sorted(limits))) or "no memory limit"
    return f"in force now: {sizes} (source: {level['by']}, tenant: {level['tenant']})"


@click.group(cls=Sections)
def device() -> None:
    """Report the repair of a device, or make the agent release all devices or open all devices again."""


@examples("fgpu device clear 0", "fgpu device clear GPU-1f3a5b00-8d41-4b7e-9c06-5a2f7e1d3b90")
@device.command()
@click.argument("gpu")
def clear(gpu: str) -> None:
    """Offer GPU (an index or a UUID) again after the repair of the error that its XID reported."""
    done = call({"verb": "clear", "device": gpu})
    say(f"gpu {done['device']}: shares are offered again")


@examples("fgpu device release", "fgpu device release --for 2min")
@device.command()
@click.option("--for", "duration", default="15min", show_default=True, help="Maximum duration, e.g. 30s or 15min.")
def release(duration: str) -> None:
    """Release all devices, so that a device can be reset, and the driver unloaded or replaced.

    Limits stay in force. The release ends with `fgpu device take`, or when the time of --for is over.
    """
    end = time.monotonic() + _RELEASE_SECONDS
    while not (answer := call({"verb": "release", "for": duration}))["done"] and time.monotonic() < end:
        time.sleep(0.05)
    if not answer["done"]:
        still = ", ".join(answer["open"]) or "NVML has not answered yet"
        fail(f"devices not released after {_RELEASE_SECONDS:.0f} s ({still}): `fgpu device take` ends the attempt", 1)
    say(f"released until {answer['until']}, or until you run `fgpu device take`")


@examples("fgpu device take", "fgpu device take && fgpu doctor")
@device.command()
def take() -> None:
    """Open the devices again after `release`. If the driver was replaced, the agent exits and is restarted."""
    call({"verb": "take"})
