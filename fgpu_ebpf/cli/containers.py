"""`fgpu cdi`: the CDI devices with which containers request the shim and their limits.

This module runs in the process of the command, which sends no request to the agent. The exit codes are 0 (done), 1 (a
failure) and 2 (wrong usage).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fgpu_ebpf import control_client
from fgpu_ebpf.cli.help_texts import Sections, examples
from fgpu_ebpf.cli.request import fail, run_dir


@click.group("cdi", cls=Sections)
def cdi_group() -> None:
    """Show the CDI devices that a container can request: fgpu.dev/share=8gib-50pct, fgpu.dev/shim=all."""


@examples("fgpu cdi list", "fgpu cdi list --json")
@cdi_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def list_devices(as_json: bool) -> None:
    """List the CDI devices of fgpu on this host, and the limits that each device sets."""
    from fgpu_ebpf.containers import injection

    found = [_device(spec, device) for spec in injection.written(run_dir()) for device in spec["devices"]]
    if as_json:
        click.echo(json.dumps(found))
        return
    if not found:
        start = f"start the agent with `{control_client.agent_command()}`"
        fail(f"there is no CDI specification of fgpu: {start}; if the agent runs, `fgpu doctor` shows the reason", 1)
    for device in found:
        click.echo(f"{device['name']:<32} {device['gives']}")


def _device(spec: dict[str, Any], device: dict[str, Any]) -> dict[str, str]:
    from fgpu_ebpf.policy import share_name

    name = f"{spec['kind']}={device['name']}"
    if not spec["kind"].endswith("/share"):
        return {"name": name, "gives": "the limits of the policies"}
    share = share_name.parse(device["name"])
    memory = [f"memory {share.memory}"] if share.memory else []
    compute = [f"compute up to {share.compute}"] if share.compute else []
    only = ["on the named device only"] if share.device else []
    return {"name": name, "gives": ", ".join(memory + compute + only)}


@examples("fgpu cdi generate 8gib 8gib-50pct", "fgpu cdi generate --output /etc/cdi/fgpu.yaml")
@cdi_group.command()
@click.argument("names", metavar="[SHARE]...", nargs=-1)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write; default: stdout.")
def generate(names: tuple[str, ...], output: Path | None) -> None:
    """Print the CDI specification of SHAREs (8gib-50pct, 50pct-50pct, all-50pct); default: the shares in agent.yaml."""
    from fgpu_ebpf.agent import host_config
    from fgpu_ebpf.containers import cdi, injection
    from fgpu_ebpf.driver import shim_store
    from fgpu_ebpf.policy.units import QuantityError

    host, errors = host_config.read()
    if host is None:
        fail("\n".join(map(str, errors)), 1)
    try:
        of = injection.parts(run_dir(), shim_store.stable_path(), injection.BIN / injection.HELPER)
        spec = cdi.share_spec(of, names or host.shares)
        if output is None:
            click.echo(cdi.text(spec), nl=False)
        else:
            cdi.write(output, spec)
    except QuantityError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"cannot write {output or 'to standard output'}: {error.strerror}", 1)
