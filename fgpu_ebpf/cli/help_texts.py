"""Parts of the help that several commands share: sections, examples, the forms of a TARGET, the keys of `fgpu top`.

This module runs in the process of the command. The reference pages are made from the same texts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from fgpu_ebpf.cli.completion import tenants

TARGET = """\b
TARGET is one of:
  NAME                a tenant of `fgpu status`
  ID                  a container's id, or its first 4 characters or more
  pod/NAMESPACE/NAME  a pod; also pod/UID
  unit/NAME           a service or scope of systemd, as in unit/ollama.service
  /PATH               a cgroup below /sys/fs/cgroup, as in /user.slice
  pid/N               the cgroup of a process"""
TOP_KEYS = """\b
t g l u p s e w r b       sort by the column with this first letter (b: HELD BY); press again to reverse
/                         filter; Enter keeps the filter, Esc clears it
up down j k, PgUp PgDn    scroll; also Space, Home, End
h ?                       show these keys
q, Ctrl-C                 quit"""
_WIDEST_TEXT = 1000  # characters: no summary of a command is cut
Decorated = TypeVar("Decorated", bound=Callable[..., Any])
AnyCommand = TypeVar("AnyCommand", bound=click.Command)


def also(text: str) -> Callable[[Decorated], Decorated]:
    """Return a decorator of a command's function that adds a paragraph to its help."""

    def add(function: Decorated) -> Decorated:
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{text}"
        return function

    return add


def target(function: Decorated) -> Decorated:
    """Add the argument TARGET to a command, and its forms to the help."""
    return click.argument("target", shell_complete=tenants)(also(TARGET)(function))


def examples(*lines: str) -> Callable[[AnyCommand], AnyCommand]:
    """Return a decorator of a command that adds examples below its options."""

    def add(command: AnyCommand) -> AnyCommand:
        command.epilog = "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
        return command

    return add


class Sections(click.Group):
    """A group that lists its commands under headings, each with its whole first sentence."""

    sections: Mapping[str, Sequence[str]] = {}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections. KeyError: a section names a command that does not exist."""
        for heading, names in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(_WIDEST_TEXT)) for name in names])
