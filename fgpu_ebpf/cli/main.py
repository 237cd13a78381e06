"""The command `fgpu`: its subcommands, which are in the other modules of this package.

The module of a subcommand is imported only when that subcommand is needed, so that each command starts quickly.

Exit codes: 0 done, 1 a finding or failure, 2 wrong usage, 3 no agent, 4 no such target. `fgpu run` exits with 125 for
every failure of its own. Most commands send a request to the agent over the control socket, and print the reply.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import click

import fgpu_ebpf
from fgpu_ebpf.cli.help_texts import Sections, examples
from fgpu_ebpf.cli.request import RUN_DIR

_FUNCTIONS = {  # of each command, with its module in this package
    "agent": ("service", "agent"),
    "cdi": ("containers", "cdi_group"),
    "completion": ("completion", "completion"),
    "detach": ("service", "detach"),
    "device": ("tenants", "device"),
    "device-plugin": ("kubernetes", "device_plugin"),
    "doctor": ("service", "doctor"),
    "events": ("views", "events"),
    "explain": ("views", "explain_target"),
    "load": ("service", "load"),
    "metrics": ("views", "metrics"),
    "policy": ("policy", "policy"),
    "ps": ("views", "ps"),
    "reload": ("service", "reload"),
    "run": ("tenants", "run"),
    "schema": ("views", "schema"),
    "set": ("tenants", "set_limits"),
    "setup": ("setup", "setup"),
    "status": ("views", "status"),
    "top": ("views", "top"),
    "unset": ("tenants", "unset"),
    "usage": ("usage", "usage"),
}


class Main(Sections):
    """`fgpu`, with its commands by subject."""

    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Watch": ("status", "top", "ps", "usage", "explain", "events", "metrics"),
        "Limit": ("run", "set", "unset", "policy"),
        "Containers": ("setup", "cdi", "device-plugin"),
        "Operate": ("doctor", "reload", "detach", "device", "agent", "load", "schema", "completion"),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(_FUNCTIONS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command. Returns None if there is no command of that name."""
        if cmd_name not in _FUNCTIONS:
            return None
        module, function = _FUNCTIONS[cmd_name]
        found = getattr(importlib.import_module(f"fgpu_ebpf.cli.{module}"), function)
        assert isinstance(found, click.Command)
        return found


@examples("fgpu run --memory 8GiB -- nvidia-smi", "fgpu explain pid/4711")
@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fgpu_ebpf.__version__, prog_name="fgpu")
@click.option("--run-dir", type=click.Path(path_type=Path), default=RUN_DIR, show_default=True, hidden=True)
def main(run_dir: Path) -> None:
    """Share NVIDIA GPUs between containers, with hard memory limits enforced by the kernel."""
