"""The command `fgpu`: its subcommands, which are in the other modules of this package.

Exit codes: 0 done, 1 a finding or failure, 2 wrong usage, 3 no agent, 4 no such target. `fgpu run` exits with 125 for
every failure of its own. Most commands send a request to the agent over the control socket, and print the reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import click

import fgpu_ebpf
from fgpu_ebpf.cli import containers, service, tenants, views
from fgpu_ebpf.cli.completion import completion
from fgpu_ebpf.cli.help_texts import Sections, examples
from fgpu_ebpf.cli.kubernetes import device_plugin
from fgpu_ebpf.cli.policy import policy
from fgpu_ebpf.cli.request import RUN_DIR
from fgpu_ebpf.cli.setup import setup
from fgpu_ebpf.cli.usage import usage


class Main(Sections):
    """`fgpu`, with its commands by subject."""

    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Watch": ("status", "top", "ps", "usage", "explain", "events", "metrics"),
        "Limit": ("run", "set", "unset", "policy"),
        "Containers": ("setup", "cdi", "device-plugin"),
        "Operate": ("doctor", "reload", "detach", "device", "agent", "load", "schema", "completion"),
    }


@examples("fgpu run --memory 8GiB -- nvidia-smi", "fgpu explain pid/4711")
@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fgpu_ebpf.__version__, prog_name="fgpu")
@click.option("--run-dir", type=click.Path(path_type=Path), default=RUN_DIR, show_default=True, hidden=True)
def main(run_dir: Path) -> None:
    """Share NVIDIA GPUs between containers, with hard memory limits enforced by the kernel."""


for command in (*service.COMMANDS, *tenants.COMMANDS, *views.COMMANDS, *containers.COMMANDS):
    main.add_command(command)
for command in (completion, device_plugin, policy, setup, usage):
    main.add_command(command)
