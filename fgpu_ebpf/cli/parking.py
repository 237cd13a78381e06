"""`fgpu park` and `fgpu wake`: copy the device memory of an idle tenant to the host, and back.

This module runs in the process of the command, which polls the agent until the tenant is parked or runs. The exit codes
are 0 (done), 1 (refused or failed), 2 (wrong usage), 3 (no agent), 4 (no such target) and 5 (a tenant is still parked).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fgpu_ebpf import control_client
from fgpu_ebpf.cli.help_texts import examples, optional_target, target
from fgpu_ebpf.cli.request import call, fail, no_answer, run_dir, say
from fgpu_ebpf.control_client import PARKED
from fgpu_ebpf.policy.units import memory_text
from fgpu_ebpf.tenancy import parking_text

_LOOK_SECONDS = 0.05
_STARTING_SECONDS = 30.0  # an agent that starts or exits holds its lock without a socket for less than this time
_FIX = "`fgpu doctor` and `fgpu explain` name the fix; or end the tenant's processes, then run `fgpu wake --all` again"


@examples("fgpu park alice", "fgpu park pod/default/jupyter-0")
@click.command()
@target
def park(target: str) -> None:
    """Copy the device memory of TARGET to the host. The tenant wakes up at its next call of the driver."""
    done = _wait(call({"verb": "park", "target": target}))
    say(f"{done['tenant']}: parked, {_copied(done)}")


@examples("fgpu wake alice", "fgpu wake --all")
@click.command()
@click.option("--all", "is_all", is_flag=True, help="Wake all parked tenants, even if no agent runs.")
@optional_target
def wake(target: str | None, is_all: bool) -> None:
    """Copy the device memory of TARGET, which is parked, back to the device. Wait until there is room.

    With --all the command waits for 20 s and the time of the copies, and exits with 5 if a tenant is still parked.
    """
    if is_all == (target is not None):
        raise click.UsageError("name a TARGET or give --all")
    if is_all:
        wake_all()
        say("no tenant is parked")
        return
    done = _wait(call({"verb": "wake", "target": target}))
    say(f"{done['tenant']}: woken, {_copied(done)}")


def wake_all() -> None:
    """Wake all parked tenants, by requests to the agent, or in this process if no agent runs.

    The function exits with PARKED if a tenant is still parked after a time limit, or with 3 if an agent does not
    answer.
    """
    if error := still_parked(run_dir()):
        fail(f"still parked: {error}. {_FIX}", PARKED)


def still_parked(folder: Path) -> str:
    """Wake all parked tenants. Return which tenants are still parked after a time limit and why, or an empty text.

    An agent that starts or exits holds its lock and has no socket, so both the requests to
    the agent and the wake-up in this process are repeated.
    """
    until = time.monotonic() + _STARTING_SECONDS
    while True:
        try:
            return _woken_by_agent(folder)
        except control_client.RequestError as error:
            return str(error)
        except ConnectionError as error:
            if time.monotonic() > until or (isinstance(error, control_client.NoAnswerError) and error.denied):
                fail(no_answer(error), 3)
        from fgpu_ebpf import daemon

        try:
            if daemon.wake_all(folder):
                return ""
        except (daemon.ParkedError, OSError) as error:
            return str(error)
        time.sleep(_LOOK_SECONDS)


def _woken_by_agent(folder: Path) -> str:
    """Request that the agent wakes all tenants. Return the text for still_parked().

    Raise ConnectionError or RequestError if a request fails.
    """
    from fgpu_ebpf.agent import parker_client, waking

    asked: set[str] = set()
    until = 0.0
    while True:
        tenants = control_client.call(folder, {"verb": "snapshot"})["tenants"]
        away = [tenant for tenant in tenants if parking_text.is_away(tenant.get("parking"))]
        if not away:
            return ""
        bytes_ = sum(d["parked_bytes"] + d["used_bytes"] for tenant in away for d in tenant["devices"])
        until = until or time.monotonic() + waking.limit_seconds(bytes_)
        if why := parker_client.missing(folder):
            return f"{', '.join(tenant['tenant'] for tenant in away)}: {why}"
        if time.monotonic() > until:
            return "; ".join(f"{t['tenant']} is {parking_text.sentence(t['parking'], t['devices'])}" for t in away)
        for tenant in away:
            if tenant["path"] not in asked:
                asked.add(tenant["path"])
                say(f"fgpu: waking {tenant['tenant']}", err=True)
                with contextlib.suppress(control_client.RequestError):  # the tenant runs or has ended
                    control_client.call(folder, {"verb": "wake", "target": tenant["path"]})
        time.sleep(_LOOK_SECONDS)


def _wait(errand: Mapping[str, Any]) -> Mapping[str, Any]:
    """Wait for the end of a request, and return the finished request. Exit with 1 if the request failed.

    During the wait, print the cause of the wait, and each new cause.
    """
    said = ""
    while not errand["done"]:
        if errand["waits"] and errand["waits"] != said:
            said = errand["waits"]
            say(f"fgpu: {errand['tenant']} waits: {said}", err=True)
        time.sleep(_LOOK_SECONDS)
        errand = call({"verb": "errand", "errand": errand["errand"]})
    if errand["error"]:
        fail(errand["error"], 1)
    return errand


def _copied(errand: Mapping[str, Any]) -> str:
    return f"{memory_text(errand['bytes'])} in {errand['seconds']:.1f} s"
