"""`fgpu park` and `fgpu wake`: copy the device memory of an idle tenant to the host, and back.

This module runs in the process of the command, which asks the agent until the tenant is parked, or runs. Exit codes: 0
done, 1 refused or failed, 2 wrong usage, 3 no agent, 4 no such target.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from fgpu_ebpf.cli.help_texts import examples, target
from fgpu_ebpf.cli.request import call, fail
from fgpu_ebpf.policy.units import memory_text

_LOOK_SECONDS = 0.05


@examples("fgpu park alice", "fgpu park pod/default/jupyter-0")
@click.command()
@target
def park(target: str) -> None:
    """Copy the device memory of TARGET to the host. It wakes up at its next call of the driver."""
    done = _wait(call({"verb": "park", "target": target}))
    click.echo(f"{done['tenant']}: parked, {_copied(done)}")


@examples("fgpu wake alice", "fgpu wake 3f1a9c")
@click.command()
@target
def wake(target: str) -> None:
    """Copy the device memory of TARGET, which is parked, back to the device. Wait until there is room."""
    done = _wait(call({"verb": "wake", "target": target}))
    click.echo(f"{done['tenant']}: woken, {_copied(done)}")


def _wait(errand: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the finished request. Print for what it waits, if that changes. Exits with 1 if it failed."""
    said = ""
    while not errand["done"]:
        if errand["waits"] and errand["waits"] != said:
            said = errand["waits"]
            click.echo(f"fgpu: {errand['tenant']} waits: {said}", err=True)
        time.sleep(_LOOK_SECONDS)
        errand = call({"verb": "errand", "errand": errand["errand"]})
    if errand["error"]:
        fail(errand["error"], 1)
    return errand


def _copied(errand: Mapping[str, Any]) -> str:
    return f"{memory_text(errand['bytes'])} in {errand['seconds']:.1f} s"
