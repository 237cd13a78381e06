"""Write the generated parts of the reference pages, from the policy's model, the metrics collector and the commands.

The module adds no statement about a key, a metric or an option: every description is taken from the code. A key without
a description, or a pattern without a text in this module, raises AssertionError or KeyError and fails the build.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from fgpu_ebpf import abi
from fgpu_ebpf.agent import host_config, host_schema
from fgpu_ebpf.api import metrics
from fgpu_ebpf.cli import output_schema
from fgpu_ebpf.cli.help_texts import Sections
from fgpu_ebpf.cli.main import main
from fgpu_ebpf.driver import bypass_reason
from fgpu_ebpf.ledger.owner_bounds import Bounds
from fgpu_ebpf.policy import fields as policy_fields
from fgpu_ebpf.policy import schema
from fgpu_ebpf.policy.validation import _model_in
from fgpu_ebpf.snapshot import PoliciesView, Snapshot

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "dashboards"
# Patterns of the schema -> their meanings, as shown in the tables.
PATTERNS = {
    policy_fields._MEMORY: "bytes: `8GiB`, `8192MiB`",
    policy_fields._PERCENT: "percentage: `50%`",
    policy_fields._DURATION: "duration: `500us`, `20ms`, `1s`",
    policy_fields._LONG: "duration: `90s`, `10m`, `2h`",
    f"^{policy_fields._NAME}$": "up to 63 lowercase letters, digits, `-` and `.`",
    f"^{policy_fields._METRIC_LABEL}$": "Prometheus label names",
}
# Labels of metrics -> the values that the code lists for the label.
VALUES: Mapping[tuple[str, str], Iterable[str]] = {
    ("fgpu_bypassing_processes", "how"): metrics._HOW,
    ("fgpu_shimless_processes", "reason"): bypass_reason.Reason,
    ("fgpu_device_opens_without_shim", "decision"): ("denied", "would_deny"),
    ("fgpu_memory_refused", "reason"): [reason.name.lower() for reason in abi.Reason],
    ("fgpu_anomalies", "kind"): [*(kind.name.lower() for kind in abi.Anomaly), "unprobed"],
}


def _table(*head: str) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


# -- documents -----------------------------------------------------------------------------------------------------


def policy() -> str:
    """Return tables of all keys of a policy, with type, default and examples."""
    return "\n".join(_model(schema.GpuPolicy, "", 3))


def host() -> str:
    """Return tables of all keys of agent.yaml. The defaults apply to a host without this file."""
    usual = host_config.HostSettings()
    defaults = {name: _plain(name, value) for name, value in usual._asdict().items()}
    keys = _keys(host_schema.HostDocument, defaults)
    parts = (
        (host_schema.ProfileDocument, "profiles[]"),
        (host_schema.SharingDocument, "devices[]"),
        (host_schema.DriversDocument, "drivers"),
        (host_schema.BoundsDocument, "bounds"),
    )
    return "\n".join([*keys, *(line for model, path in parts for line in _model(model, path, 3))])


def _plain(name: str, value: Any) -> Any:
    if name == "overcommit":
        return "allow" if value else "forbid"
    if value is None:
        return None
    if name == "parking":
        return "on" if value else "off"
    if isinstance(value, Bounds):
        return value._asdict()
    return list(value) if isinstance(value, tuple) else str(value)


def _model(model: type[BaseModel], path: str, level: int) -> Iterator[str]:
    title = f"`{path}`" if path else "The document"
    yield from ("", f"{'#' * level} {title}", "", inspect.cleandoc(model.__doc__ or ""), "")
    yield from _keys(model, {})
    for field in model.model_fields.values():
        inner = _model_in(field.annotation)
        if inner:
            yield from _model(inner, f"{path}.{field.alias}".lstrip("."), level)


def _keys(model: type[BaseModel], defaults: Mapping[str, Any]) -> Iterator[str]:
    schema = model.model_json_schema()
    yield from _table("key", "type", "default", "description")
    for name, field in model.model_fields.items():
        key = str(field.alias or name)
        shown = schema["properties"][key]
        default = defaults.get(name, shown.get("default"))
        required = "required" if field.is_required() else ""
        assert field.description, f"{model.__name__}.{name} does not say what it is"
        examples = [f"`{_written(example)}`" for example in field.examples or ()]
        label = "Example" if len(examples) == 1 else "Examples"
        shows = examples and not _model_in(field.annotation)
        said = field.description + (f" {label}: {', '.join(examples)}." if shows else "")
        yield _row(f"`{key}`", _type(shown, schema), required or _default(default), said)


def _default(value: Any) -> str:
    return "" if value is None else f"`{_written(value)}`"


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _type(shown: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if "$ref" in shown:
        return "mapping"
    if "anyOf" in shown:
        return " or ".join(dict.fromkeys(_type(one, schema) for one in shown["anyOf"]))
    if "enum" in shown or "const" in shown:
        return ", ".join(f"`{value}`" for value in shown.get("enum", [shown.get("const")]))
    if "pattern" in shown:
        return PATTERNS[shown["pattern"]]
    match shown["type"]:
        case "array":
            items = _type(shown["items"], schema)
            return "list of mappings" if items == "mapping" else f"list of {items}"
        case "object":
            return "mapping of labels"
        case "integer" if "minimum" in shown:
            return f"{shown['minimum']} to {shown['maximum']}"
        case "integer":
            return "number of bytes"
        case found:
            return {"string": "text"}[found]


# -- metrics -------------------------------------------------------------------------------------------------------


def families() -> list[Any]:
    """Return all families of metrics of the collector."""
    everything = Snapshot(1.0, policies=PoliciesView(True, 1.0, 1, ()), gatekeeper_up=True)
    return list(metrics.families(everything))


def exposed(family: Any) -> str:
    """Return the name of a family on /metrics. The name of a counter ends with _total."""
    return f"{family.name}_total" if family.type == "counter" else str(family.name)


def metric_table() -> str:
    """Return a table of all families: type, labels, help, and the files of dashboards/ that use the family."""
    asked = _asked()
    lines = _table("metric", "type", "labels", "description", "used by")
    for family in families():
        labels = [_label(family.name, label) for label in family._labelnames]
        if family.name == "fgpu_tenant_info":
            labels.append("the labels of `metricLabels`")
        name = rf"\b{exposed(family)}(_bucket|_sum|_count)?\b"
        users = ", ".join(who for who, text in asked.items() if re.search(name, text))
        lines.append(_row(f"`{exposed(family)}`", family.type, ", ".join(labels), family.documentation, users))
    return "\n".join(lines)


def _label(metric: str, label: str) -> str:
    values = VALUES.get((metric, label), ())
    return f"`{label}`" + (f" ({', '.join(values)})" if values else "")


def _asked() -> dict[str, str]:
    found = {"alerts": (DASHBOARDS / "rules.yaml").read_text()}
    for file in sorted(DASHBOARDS.rglob("*.json")):
        found[json.loads(file.read_text())["title"].removeprefix("fgpu / ")] = file.read_text()
    return found


# -- commands ------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield each command of `fgpu` that is not hidden, with the words of its command line."""
    yield from _commands("fgpu", main)


def _commands(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield words, command
    if isinstance(command, Sections):
        for name, inner in sorted(command.all_commands().items()):
            if not inner.hidden:
                yield from _commands(f"{words} {name}", inner)


def options(command: click.Command) -> list[click.Option]:
    """Return the options that `--help` shows, without `--help` itself."""
    return [p for p in command.params if isinstance(p, click.Option) and not p.hidden and p.name != "help"]


def command_pages() -> str:
    """Return a section for each command: usage, description and options."""
    lines: list[str] = []
    for words, command in commands():
        context = click.Context(command, info_name=words)
        usage = " ".join([words, *command.collect_usage_pieces(context)])
        lines += ["", f"## {words}", "", "```text", usage, "```", "", *_help(inspect.cleandoc(command.help or ""))]
        if options(command):
            lines += ["", *_table("option", "value", "description")]
            lines += [_row(*_option(option, context)) for option in options(command)]
        lines += _help(command.epilog or "")
    return "\n".join(lines)


def _option(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    said = option.help or ""
    if option.show_default and option.default is not None:
        said += f" The default is `{option.default}`."
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if isinstance(option.type, click.Choice):
        return names, ", ".join(f"`{choice}`" for choice in option.type.choices), said
    return names, "" if option.is_flag else f"`{option.make_metavar(context)}`", said


def _help(text: str) -> Iterator[str]:
    """Yield each paragraph. A paragraph that click must not wrap is yielded as a block of code."""
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("\b\n"):
            yield from ("", "```text", paragraph[2:], "```")
        else:
            yield paragraph.strip()


# -- JSON outputs --------------------------------------------------------------------------------------------------


def outputs() -> str:
    """Return a section for each object that `--json` prints: description, fields and types."""
    lines: list[str] = []
    for command in output_schema.PRINTED:
        definitions = output_schema.of(command)["$defs"]
        lines += ["", f"## Objects of {command}"]
        for name, one in definitions.items():
            lines += ["", f"### {name}", "", one["description"], "", *_table("field", "type")]
            lines += [_row(f"`{key}`", _json_type(shown)) for key, shown in one["properties"].items()]
    return "\n".join(lines)


def _json_type(shown: Mapping[str, Any]) -> str:
    if "anyOf" in shown:
        return " or ".join(map(_json_type, shown["anyOf"]))
    if "$ref" in shown:
        name = shown["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    match shown.get("type"):
        case "array" if "prefixItems" in shown:
            return f"list ({', '.join(map(_json_type, shown['prefixItems']))})"
        case "array":
            return f"list of {_json_type(shown['items'])}"
        case "object":
            return f"object (values: {_json_type(shown['additionalProperties'])})"
        case found:
            return str(found or "any type")


WRITERS = {
    "policy": policy, "host": host, "metrics": metric_table, "commands": command_pages, "json": outputs,
}  # fmt: skip
