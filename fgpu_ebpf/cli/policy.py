"""`fgpu policy`: check, list and describe policy files.

This module runs in the process of the command, and reads the files itself. The output is therefore the contents of the
files, not the policies in force. Only the number of tenants that a policy matches is requested from the agent. The exit
codes are 0 (done), 1 (a finding) and 2 (wrong usage).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fgpu_ebpf.cli.help_texts import Sections, examples
from fgpu_ebpf.cli.request import HINT_SECONDS, run_dir

if TYPE_CHECKING:  # `yaml_document` imports PyYAML, which would delay other commands
    from fgpu_ebpf.policy.rules import Policy, PolicySet
    from fgpu_ebpf.policy.selector import Selector
    from fgpu_ebpf.policy.units import Amount
    from fgpu_ebpf.policy.yaml_document import ConfigError

Paths = tuple[Path, ...]
_PATHS = click.argument("paths", nargs=-1, type=click.Path(path_type=Path))


@click.group("policy", cls=Sections)
def policy() -> None:
    """Check, list and describe policy files. No agent is needed."""


@examples("fgpu policy check", "fgpu policy check new.yaml")
@policy.command()
@_PATHS
def check(paths: Paths) -> None:
    """Check PATHS (files or folders), or this host's policies; print every error, and exit with 1 after an error.

    A selector or device that no host can match is a warning, which does not change the exit code. A policy of this host
    with memory.park causes a warning too, unless agent.yaml turns parking on, and so does a missing folder.
    """
    from fgpu_ebpf.policy import advice

    policies = _must_read(paths)
    files = len({p.source.rpartition(":")[0] for p in policies})
    warnings = [f"{p.source}: warning: spec.{text}" for p in policies for text in advice.warnings(p)]
    if not paths and not _parks():
        warnings += [f"{p.source}: warning: spec.{advice.UNPARKED}" for p in policies if advice.wants_parking(p)]
    if not paths and (folder := _missing_folder()):
        warnings.append(f"{folder}: warning: does not exist: an agent that runs keeps its last policies")
    for line in warnings:
        click.echo(line, err=True)
    more = f", {_count(len(warnings), 'warning', 'warnings')}" if warnings else ""
    more += "" if policies else ": no workload gets a limit from a policy"
    click.echo(f"ok: {_count(len(policies), 'policy', 'policies')} in {_count(files, 'file', 'files')}{more}")


@examples("fgpu policy list", "fgpu policy list --json")
@policy.command("list")
@_PATHS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def list_policies(paths: Paths, as_json: bool) -> None:
    """List policies in the order in which they are tried: the first policy that matches decides.

    For this host's own policies, the list shows how many tenants each policy matches now, if an agent runs.
    """
    policies = _must_read(paths)
    counts = None if paths else _tenants()
    if as_json:
        click.echo(json.dumps([_json(p) | ({} if paths else {"tenants": counts and counts[p.name]}) for p in policies]))
        return
    if not policies:
        click.echo("no policy: no workload gets a limit from a policy")
    for position, found in enumerate(policies, 1):
        click.echo(_text(position, found))
        if counts is not None:
            click.echo(f"   matches {_count(counts[found.name], 'tenant', 'tenants')} now")


def _tenants() -> Counter[str] | None:
    """Return how many tenants each policy matches, by the policy's name, or None if no agent answers this user."""
    from fgpu_ebpf import control_client

    try:
        snapshot = control_client.call(run_dir(), {"verb": "snapshot"}, HINT_SECONDS)
    except (ConnectionError, control_client.RequestError):
        return None
    return Counter(tenant["policy"] for tenant in snapshot["tenants"] if tenant["kind"] != "gone")


@examples("fgpu policy schema", "fgpu policy schema >gpupolicy.json")
@policy.command()
def schema() -> None:
    """Print the JSON Schema of a policy, for editors."""
    from fgpu_ebpf.policy import schema

    click.echo(json.dumps(schema.json_schema(), indent=2))


# -- reading -------------------------------------------------------------------------------------------------------


def _must_read(paths: Paths) -> list[Policy]:
    """Return the policies. If a file has an error, print a line for each error and exit with 1."""
    policies, errors = _read(paths)
    for error in errors:
        click.echo(str(error), err=True)
    if errors:
        click.echo(f"fgpu: {_count(len(errors), 'error', 'errors')}: no policy of these files would be used", err=True)
        sys.exit(1)
    return policies


def _read(paths: Paths) -> tuple[list[Policy], list[ConfigError]]:
    """Read the given files, regardless of their owner.

    Without paths, read the folder of agent.yaml by the agent's rules. The result is the policies, and the errors found.
    """
    from fgpu_ebpf.agent import host_config
    from fgpu_ebpf.policy import folder
    from fgpu_ebpf.policy.folder import PolicyFolder

    if not paths:
        host, refused = host_config.read()
        if host is None:
            return [], list(refused)
        reading = PolicyFolder(host.policy_folder, settle_seconds=0).read()
        return _listed(reading.policies), list(reading.errors)
    policies: list[Policy] = []
    errors: list[ConfigError] = []
    for path in paths:
        if path.is_dir():
            reading = PolicyFolder(path, root_only=False, settle_seconds=0).read()
            found, wrong = _listed(reading.policies), list(reading.errors)
        else:
            found, wrong = _read_file(path)
        policies += found
        errors += wrong
    return policies, errors or folder.whole(policies)


def _listed(policies: PolicySet | None) -> list[Policy]:
    return list(policies.policies) if policies else []


def _parks() -> bool:
    """Return whether this host's agent.yaml turns parking on. A file with errors turns nothing on."""
    from fgpu_ebpf.agent import host_config

    settings, _ = host_config.read()
    return settings is not None and settings.parking


def _missing_folder() -> Path | None:
    """Return the folder of this host's policies if the folder does not exist, else None."""
    from fgpu_ebpf.agent import host_config
    from fgpu_ebpf.policy.folder import PolicyFolder

    host, _ = host_config.read()
    return host.policy_folder if host and PolicyFolder(host.policy_folder).state() is None else None


def _read_file(path: Path) -> tuple[list[Policy], list[ConfigError]]:
    from fgpu_ebpf.policy import folder, trusted_file
    from fgpu_ebpf.policy.yaml_document import ConfigError, InvalidFileError

    try:
        data, _ = trusted_file.load(str(path), str(path), root_only=False)
    except InvalidFileError as invalid:
        return [], [invalid.error]
    except OSError as error:
        return [], [ConfigError(str(path), 0, "", f"cannot be read: {error.strerror}")]
    return folder.parse(str(path), data)


# -- showing -------------------------------------------------------------------------------------------------------


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"


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
        "memory": {
            "limit": _amount(memory.limit),
            "max": _amount(memory.most),
            "contexts": memory.contexts,
            "park_after_seconds": memory.park.after_ns / 1e9 or None,
            "park_bytes": memory.park.most_bytes or None,
            "park_deadline_seconds": memory.park.deadline_ns / 1e9 or None,
        }
        if memory
        else None,
        "compute": {
            "limit_ratio": compute.limit_ratio,
            "weight": compute.weight,
            "priority": compute.priority.value,
            "quantum_ns": compute.quantum_ns,
            "isolation": "own" if compute.isolated else "shared",
        }
        if compute
        else None,
        "on_bypass": "kill" if found.kill else "deny" if found.deny else "report",
        "utilization": "own" if found.own_utilization else "device",
        "metric_labels": list(found.metric_labels),
    }


def _amount(amount: Amount) -> dict[str, float]:
    return {"ratio": amount.millionths / 1e6} if amount.millionths else {"bytes": amount.bytes}


def _text(position: int, found: Policy) -> str:
    """Return a policy as lines: the heading, each part of the selector, and the limits.

    Example of a heading: `1. notebooks (10-team.yaml:3): enforce`.
    """
    lines = [f"{position}. {found.name} ({found.source}): {'observe' if found.observe else 'enforce'}"]
    lines += [f"   {key}: {', '.join(values)}" for key, values in _selector(found.selector).items()]
    devices = ", ".join(choice.text for choice in found.devices)
    lines.append(f"   devices {devices}: {', '.join(_gives(found)) or 'no limit'}")
    return "\n".join(lines)


def _gives(found: Policy) -> Iterable[str]:
    from fgpu_ebpf.policy.units import MILLION, amount_text, duration_text, memory_text, millionths_text

    if found.memory:
        most = f" (up to {amount_text(found.memory.most)} by label)" if found.memory.most != found.memory.limit else ""
        n = found.memory.contexts
        besides = f" and {n} context{'s' if n > 1 else ''}" if n else ""
        park = found.memory.park
        most_parked = f" with {memory_text(park.most_bytes)} at most" if park.most_bytes else ""
        idle = f", parked{most_parked} when idle for {duration_text(park.after_ns / 1e9)}" if park.after_ns else ""
        waits = f", requests wait for {duration_text(park.deadline_ns / 1e9)}" if park.deadline_ns else ""
        yield f"memory {amount_text(found.memory.limit)}{most}{besides}{idle}{waits}"
    if found.compute:
        ceiling = millionths_text(round(found.compute.limit_ratio * MILLION))
        isolated = ", without MPS" if found.compute.isolated else ""
        yield f"compute up to {ceiling}, weight {found.compute.weight}, {found.compute.priority} priority{isolated}"
