"""The functions that several commands share: the run folder, requests to the agent, and exits with an error.

This module runs in the process of the command.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from fgpu_ebpf import control_client
from fgpu_ebpf.linux import printable

RUN_DIR = Path("/run/fgpu")
HINT_SECONDS = 1.0  # the longest wait for data that only improves a message
NO_TARGET = 4  # the exit code if a target does not exist


def run_dir() -> Path:
    """Return the folder of the agent's sockets, from --run-dir. Only click's thread may call this function."""
    folder: Path = click.get_current_context().find_root().params.get("run_dir", RUN_DIR)
    return folder


def say(text: str, err: bool = False) -> None:
    """Print lines for a person, without control characters. `err`: print to stderr."""
    click.echo(printable.lines(text), err=err)


def fail(text: str, code: int) -> NoReturn:
    """Print an error and exit."""
    say(f"fgpu: {text}", err=True)
    sys.exit(code)


def no_answer(error: ConnectionError) -> str:
    """Return a text with the reason why the agent does not answer, and the fix."""
    return f"{error}: {error.fix}" if isinstance(error, control_client.NoAnswerError) else str(error)


def call(request: dict[str, Any]) -> Any:
    """Return the agent's answer. Exit with 3 if no agent answers, or with the code of a refusal."""
    try:
        return control_client.call(run_dir(), request)
    except ConnectionError as error:
        fail(no_answer(error), 3)
    except control_client.RequestError as error:
        meant = did_you_mean(request["target"]) if error.code == NO_TARGET and "target" in request else ""
        fail(f"{error}{meant}", error.code)


def did_you_mean(name: str) -> str:
    """Return `; did you mean alice?` if a tenant has a similar name, else an empty text."""
    import difflib

    try:
        snapshot = control_client.call(run_dir(), {"verb": "snapshot"}, HINT_SECONDS)
    except (ConnectionError, control_client.RequestError):
        return ""
    others = [tenant["tenant"] for tenant in snapshot["tenants"] if tenant["tenant"] != name]
    found = difflib.get_close_matches(name, others, 1)
    return f"; did you mean {found[0]}?" if found else ""
