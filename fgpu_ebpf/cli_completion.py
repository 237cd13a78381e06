"""`fgpu completion`: what a shell needs to complete the words of `fgpu`, and tenants' names among them.

Owns: nothing that a shell asks for later is kept: each time it asks again. Never: makes somebody wait who has pressed a
key: where no agent answers at once there are no names.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from fgpu_ebpf import control

PATIENCE_SECONDS = 1.0
PROGRAM = "fgpu"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what SHELL needs to complete fgpu's words: eval "$(fgpu completion bash)"."""
    speaker = get_completion_class(shell)
    assert speaker
    root = click.get_current_context().find_root().command
    click.echo(speaker(root, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source(), nl=False)


def tenants(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of tenants that begin so, each with where it is."""
    run_dir: Path = ctx.find_root().params["run_dir"]
    try:
        snapshot = control.call(run_dir, {"verb": "snapshot"}, PATIENCE_SECONDS)
    except (ConnectionError, control.RequestError):
        return []
    found = ((tenant["tenant"], tenant["path"]) for tenant in snapshot["tenants"])
    return [CompletionItem(name, help=path) for name, path in found if name.startswith(incomplete)]
