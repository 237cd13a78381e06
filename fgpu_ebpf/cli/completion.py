"""`fgpu completion`: print the completion script of a shell. `help_texts` completes the names of tenants.

This module runs in the process of the command.
"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from fgpu_ebpf.cli.help_texts import examples

PROGRAM = "fgpu"


@examples('eval "$(fgpu completion bash)"', "fgpu completion fish >~/.config/fish/completions/fgpu.fish")
@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the code with which SHELL completes fgpu's commands: eval "$(fgpu completion bash)"."""
    shell_class = get_completion_class(shell)
    assert shell_class
    root = click.get_current_context().find_root().command
    click.echo(shell_class(root, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source(), nl=False)
