"""`fgpu completion`: print the completion script of a shell, and complete the names of tenants.

This module runs in the process of the command. Nothing is cached: each completion asks the agent, and waits at most
PATIENCE_SECONDS. Without an agent there are no names to complete.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from fgpu_ebpf import control_client

PATIENCE_SECONDS = 1.0
PROGRAM = "fgpu"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the code with which SHELL completes fgpu's commands: eval "$(fgpu completion bash)"."""
    shell_class = get_completion_class(shell)
    assert shell_class
    root = click.get_current_context().find_root().command
    click.echo(shell_class(root, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source(), nl=False)


def tenants(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of tenants that begin with `incomplete`, each with its cgroup's path as help."""
    run_dir: Path = ctx.find_root().params["run_dir"]
    try:
        snapshot = control_client.call(run_dir, {"verb": "snapshot"}, PATIENCE_SECONDS)
    except (ConnectionError, control_client.RequestError):
        return []
    found = ((tenant["tenant"], tenant["path"]) for tenant in snapshot["tenants"])
    return [CompletionItem(name, help=path) for name, path in found if name.startswith(incomplete)]
