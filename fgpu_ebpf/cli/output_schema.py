"""The JSON Schemas of the --json output of `fgpu status`, `ps`, `usage` and `events`, made from the printed classes.

This module runs in the process of `fgpu schema`. Within a VERSION, properties are only added. Tests compare the schemas
with the schemas of the version's first release. A type for which this module has no schema raises KeyError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from inspect import getdoc
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fgpu_ebpf.cli.tables import ProcessRow
from fgpu_ebpf.cli.usage import UsageRow
from fgpu_ebpf.snapshot import Snapshot
from fgpu_ebpf.tenancy.event_log import Event

VERSION = 1
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
PRINTED: Mapping[str, Any] = {
    "status": Snapshot, "ps": list[ProcessRow], "usage": list[UsageRow], "events": Event,
}  # fmt: skip


def of(command: str) -> dict[str, Any]:
    """Return the JSON Schema of the output of `fgpu COMMAND --json`. For `events`, the schema describes one line."""
    definitions: dict[str, Any] = {}
    printed = _schema(PRINTED[command], definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:fgpu:{command}:v{VERSION}",
        "title": f"fgpu {command} --json",
        **printed,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type, and add the schemas of all classes in this type to `definitions`."""
    if is_dataclass(hint):
        name = getattr(hint, "__name__", "")
        if name not in definitions:
            definitions[name] = {}  # ends the recursion if a class contains itself
            definitions[name] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{name}"}
    parts = [_schema(part, definitions) for part in get_args(hint) if part is not ...]
    match get_origin(hint):
        case None:
            return {} if hint is Any else {"type": TYPES[hint]}
        case origin if origin is UnionType:
            return {"anyOf": parts}
        case origin if origin is Mapping:
            return {"type": "object", "additionalProperties": parts[1]}
        case origin if origin is list or ... in get_args(hint):
            return {"type": "array", "items": parts[0]}
        case origin if origin is tuple:
            return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
        case origin:
            raise KeyError(origin)


def _object(view: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a class.

    All fields are required. Additional fields are allowed, for later versions of fgpu.
    """
    hints = get_type_hints(view)
    properties = {field.name: _schema(hints[field.name], definitions) for field in fields(view)}
    said = re.sub(r"\bNone\b", "null", " ".join((getdoc(view) or "").split()))
    return {"type": "object", "description": said, "properties": properties, "required": list(properties)}
