"""The command `fgpu`, whose subcommands are in the other modules of this package.

The module of a subcommand is imported only when that subcommand is needed, so that each command starts quickly.

The exit codes are 0 (done), 1 (a finding or failure), 2 (wrong usage), 3 (no agent), 4 (no such target) and 5 (a tenant
is still parked). `fgpu run` exits with 125 for every failure of its own. Most commands send a request to the agent over
the control socket, and print the reply.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import click

import fgpu_ebpf
from fgpu_ebpf.cli.help_texts import Sections, examples
from fgpu_ebpf.cli.request import RUN_DIR


class Main(Sections):
    """The group `fgpu` with the commands by subject.

    The value of a command is a module of this package and a function.
    """

    sections: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "Watch": {
            "status": "views:status",
            "top": "views:top",
            "ps": "views:ps",
            "usage": "usage:usage",
            "explain": "views:explain_target",
            "events": "views:events",
            "metrics": "views:metrics",
        },
        "Limit": {
            "run": "tenants:run",
            "set": "tenants:set_limits",
            "unset": "tenants:unset",
            "policy": "policy:policy",
            "park": "parking:park",
            "wake": "parking:wake",
        },
        "Containers": {
            "setup": "setup:setup",
            "cdi": "containers:cdi_group",
            "device-plugin": "kubernetes:device_plugin",
            "dra-driver": "kubernetes:dra_driver",
        },
        "Operate": {
            "doctor": "service:doctor",
            "reload": "service:reload",
            "detach": "service:detach",
            "device": "tenants:device",
            "agent": "service:agent",
            "load": "service:load",
            "mps": "service:mps",
            "schema": "views:schema",
            "completion": "completion:completion",
        },
    }
    _places: ClassVar[Mapping[str, str]] = ChainMap(*map(dict, sections.values()))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command. Return None if there is no command of that name."""
        module, _, function = self._places.get(cmd_name, "").partition(":")
        if not module:
            return None
        found = getattr(importlib.import_module(f"fgpu_ebpf.cli.{module}"), function)
        assert isinstance(found, click.Command)
        return found


@examples("fgpu run --memory 8GiB -- nvidia-smi", "fgpu explain pid/4711")
@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fgpu_ebpf.__version__, prog_name="fgpu")
@click.option("--run-dir", type=click.Path(path_type=Path), default=RUN_DIR, show_default=True, hidden=True)
def main(run_dir: Path) -> None:
    """Share NVIDIA GPUs between containers, with hard memory limits enforced by the kernel."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a cgroup may be invalid UTF-8
