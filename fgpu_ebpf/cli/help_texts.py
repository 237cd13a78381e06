"""The parts of the help that several commands share: sections, examples, the forms of a TARGET, the keys of `fgpu top`.

This module runs in the process of the command. The reference pages are made from the same texts. Completion caches
nothing. Each completion sends a request to the agent, and waits for at most HINT_SECONDS. If no agent runs, completion
finds no names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from fgpu_ebpf import control_client
from fgpu_ebpf.cli.request import HINT_SECONDS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

TARGET = """\b
TARGET is one of:
  NAME                a tenant of `fgpu status`
  ID                  a container's id, or its first 4 characters or more
  pod/NAMESPACE/NAME  a pod; also pod/UID
  unit/NAME           a service or scope of systemd, as in unit/ollama.service
  /PATH               a cgroup below /sys/fs/cgroup, as in /user.slice
  pid/N               the cgroup of a process"""
TOP_WORDS = (
    "A device's bar: memory held by tenants (█), held by other processes (▒), and",
    "committed to tenants but not held yet (░). SHARE and ENTITLED are parts of the",
    "device's time in the last half second.",
)
TOP_KEYS = (
    "t g l u p s e w r b     sort by the column with this first letter (b: HELD BY);",
    "                        press again to reverse",
    "/                       filter; Enter keeps the filter, Esc clears it",
    "up down j k PgUp PgDn   scroll; also Space, Home, End",
    "h ?                     show these keys",
    "q Ctrl-C                quit",
)
_WIDEST_TEXT = 1000  # characters, so that no summary of a command is truncated
Decorated = TypeVar("Decorated", bound=Callable[..., Any])
AnyCommand = TypeVar("AnyCommand", bound=click.Command)


def lines(of: Sequence[str]) -> str:
    """Return a paragraph that click does not wrap."""
    return "\n".join(["\b", *of])


def also(text: str) -> Callable[[Decorated], Decorated]:
    """Return a decorator of a command's function that adds a paragraph to the command's help."""

    def add(function: Decorated) -> Decorated:
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{text}"
        return function

    return add


def target(function: Decorated) -> Decorated:
    """Add the argument TARGET to a command, and the forms of a TARGET to the help."""
    return click.argument("target", shell_complete=_tenants)(also(TARGET)(function))


def optional_target(function: Decorated) -> Decorated:
    """Add the optional argument TARGET to a command, and the forms of a TARGET to the help."""
    return click.argument("target", required=False, shell_complete=_tenants)(also(TARGET)(function))


def _tenants(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of tenants that begin with `incomplete`, with the path of the tenant's cgroup as help."""
    from click.shell_completion import CompletionItem  # only completion needs this module

    run_dir: Path = ctx.find_root().params["run_dir"]
    try:
        snapshot = control_client.call(run_dir, {"verb": "snapshot"}, HINT_SECONDS)
    except (ConnectionError, control_client.RequestError):
        return []
    found = ((tenant["tenant"], tenant["path"]) for tenant in snapshot["tenants"])
    return [CompletionItem(name, help=path) for name, path in found if name.startswith(incomplete)]


def examples(*typed: str) -> Callable[[AnyCommand], AnyCommand]:
    """Return a decorator of a command that adds examples below the options."""

    def add(command: AnyCommand) -> AnyCommand:
        command.epilog = lines(["Examples:", *(f"  {line}" for line in typed)])
        return command

    return add


class Sections(click.Group):
    """A click group that lists its commands under headings, with the whole first sentence of a command's help."""

    sections: ClassVar[Mapping[str, Iterable[str]]] = {}  # empty: all commands under one heading

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections. Raise KeyError if a section names a command that does not exist."""
        known = self.all_commands()
        for heading, names in (self.sections or {"Commands": sorted(known)}).items():
            with formatter.section(heading):
                formatter.write_dl([(name, known[name].get_short_help_str(_WIDEST_TEXT)) for name in names])

    def all_commands(self) -> dict[str, click.Command]:
        """Return the commands by name."""
        context = click.Context(self)
        found = {name: self.get_command(context, name) for name in self.list_commands(context)}
        return {name: command for name, command in found.items() if command}
