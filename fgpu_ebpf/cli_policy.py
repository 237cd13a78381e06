"""`fgpu policy`: check, list, schema.

Owns: how policies and their faults are printed. Never: asks the agent: what is in the files is what is shown. Exit
codes as everywhere: 0 done, 1 a finding, 2 usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # other commands must not wait for the readers of YAML
    from fgpu_ebpf.policy import Policy, PolicySet, Selector
    from fgpu_ebpf.quantities import Amount
    from fgpu_ebpf.yamlfile import Fault

Paths = tuple[Path, ...]
_PATHS = click.argument("paths", nargs=-1, type=click.Path(path_type=Path))


@click.group("policy")
def policy() -> None:
    """Check, list and describe policy files; no agent is needed."""


@policy.command()
@_PATHS
def check(paths: Paths) -> None:
    """Check files or folders PATHS, or this host's own; exit 1 with every fault."""
    policies = _must_read(paths)
    files = len({p.source.rpartition(":")[0] for p in policies})
    click.echo(f"ok: {_count(len(policies), 'policy', 'policies')} in {_count(files, 'file', 'files')}")


@policy.command("list")
@_PATHS
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def list_policies(paths: Paths, as_json: bool) -> None:
    """List policies in the order in which they are asked: the first that matches decides."""
    policies = _must_read(paths)
    if as_json:
        click.echo(json.dumps([_json(p) for p in policies]))
        return
    for position, found in enumerate(policies, 1):
        click.echo(_text(position, found))


@policy.command()
def schema() -> None:
    """Print the JSON Schema of a policy, for editors."""
    from fgpu_ebpf import policymodel

    click.echo(json.dumps(policymodel.json_schema(), indent=2))


# -- reading -------------------------------------------------------------------------------------------------------


def _must_read(paths: Paths) -> list[Policy]:
    """The policies; with a fault none, but a line for each and exit code 1."""
    policies, faults = _read(paths)
    for fault in faults:
        click.echo(str(fault), err=True)
    if faults:
        click.echo(f"fgpu: {_count(len(faults), 'fault', 'faults')}: nothing of this would be taken over", err=True)
        sys.exit(1)
    return policies


def _read(paths: Paths) -> tuple[list[Policy], list[Fault]]:
    """Files as they are, whoever may write them; without PATHS, what the agent would take, by its own rules."""
    from fgpu_ebpf import policyfolder
    from fgpu_ebpf.policyfolder import PolicyFolder

    if not paths:
        reading = PolicyFolder(policyfolder.FOLDER, settle_seconds=0).read()
        return _listed(reading.policies), list(reading.faults)
    policies: list[Policy] = []
    faults: list[Fault] = []
    for path in paths:
        if path.is_dir():
            reading = PolicyFolder(path, root_only=False, settle_seconds=0).read()
            found, wrong = _listed(reading.policies), list(reading.faults)
        else:
            found, wrong = _read_file(path)
        policies += found
        faults += wrong
    return policies, faults or policyfolder.whole(policies)


def _listed(policies: PolicySet | None) -> list[Policy]:
    return list(policies.policies) if policies else []


def _read_file(path: Path) -> tuple[list[Policy], list[Fault]]:
    from fgpu_ebpf import configfile, policyfolder
    from fgpu_ebpf.yamlfile import Fault, FaultError

    try:
        data, _ = configfile.load(str(path), str(path), root_only=False)
    except FaultError as error:
        return [], [error.fault]
    except OSError as error:
        return [], [Fault(str(path), 0, "", f"cannot be read: {error.strerror}")]
    return policyfolder.parse(str(path), data)


# -- showing -------------------------------------------------------------------------------------------------------


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _selector(selector: Selector) -> dict[str, list[str]]:
    globs = {
        "cgroup": selector.cgroup,
        "namespace": selector.namespace,
        "image": selector.image,
        "unit": selector.unit,
    }
    said = {key: list(value.texts) for key, value in globs.items() if value}
    return {**said, "labels": [str(test) for test in selector.labels]} if selector.labels else said


def _json(found: Policy) -> dict[str, Any]:
    memory, compute = found.memory, found.compute
    return {
        "name": found.name,
        "source": found.source,
        "mode": "observe" if found.observe else "enforce",
        "selector": _selector(found.selector),
        "devices": [choice.text for choice in found.devices],
        "memory": {"limit": _amount(memory.limit), "max": _amount(memory.most)} if memory else None,
        "compute": {
            "limit_ratio": compute.limit_ratio,
            "weight": compute.weight,
            "priority": compute.priority.value,
            "quantum_ns": compute.quantum_ns,
        }
        if compute
        else None,
        "on_bypass": "kill" if found.kill else "report",
        "utilization": "own" if found.own_utilization else "device",
        "metric_labels": list(found.metric_labels),
    }


def _amount(amount: Amount) -> dict[str, float]:
    return {"ratio": amount.millionths / 1e6} if amount.millionths else {"bytes": amount.bytes}


def _text(position: int, found: Policy) -> str:
    """`1. notebooks (10-team.yaml:3): enforce`, a line for each part of its selector, then what it gives."""
    lines = [f"{position}. {found.name} ({found.source}): {'observe' if found.observe else 'enforce'}"]
    lines += [f"   {key}: {', '.join(values)}" for key, values in _selector(found.selector).items()]
    devices = ", ".join(choice.text for choice in found.devices)
    lines.append(f"   devices {devices}: {', '.join(_gives(found)) or 'no limit'}")
    return "\n".join(lines)


def _gives(found: Policy) -> Iterable[str]:
    from fgpu_ebpf.quantities import MILLION, amount_text, millionths_text

    if found.memory:
        most = f" (up to {amount_text(found.memory.most)} by label)" if found.memory.most != found.memory.limit else ""
        yield f"memory {amount_text(found.memory.limit)}{most}"
    if found.compute:
        ceiling = millionths_text(round(found.compute.limit_ratio * MILLION))
        yield f"compute up to {ceiling}, weight {found.compute.weight}, {found.compute.priority} priority"
