"""The output of `--json` follows `fgpu schema`, and a schema keeps the promises of its version."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from fgpu_ebpf.cli import output_schema, tables
from fgpu_ebpf.cli.main import main
from fgpu_ebpf.snapshot import plain
from fgpu_ebpf.tenancy.event_log import EventLog

from .test_metrics import snapshot

VERSION = 1
PROMISED: dict[str, Any] = json.loads(Path(__file__).with_name(f"output_v{VERSION}.json").read_text())
Schema = dict[str, Any]


def printed(command: str) -> Schema:
    done = CliRunner().invoke(main, ["schema", command])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.output))


def kinds(schema: Schema) -> set[str]:
    """Return the possible types of a property. The type of an object or a list includes the types of its elements."""
    if "anyOf" in schema:
        return {kind for one in schema["anyOf"] for kind in kinds(one)}
    if "$ref" in schema:
        return {schema["$ref"]}
    inner = [schema.get("items"), schema.get("additionalProperties"), *schema.get("prefixItems", ())]
    of = ", ".join(sorted(kind for part in inner if isinstance(part, dict) for kind in kinds(part)))
    return {f"{schema.get('type', 'any')} of {of}" if of else schema.get("type", "any")}


def broken(before: Schema, after: Schema) -> list[str]:
    """Return the properties of `before` that a program can no longer rely on in `after`."""
    found = [] if before["$id"] == after["$id"] and kinds(before) == kinds(after) else ["the document"]
    for name, old in before["$defs"].items():
        new = after["$defs"].get(name, {"properties": {}, "required": []})
        for key, kind in old["properties"].items():
            if not kinds(new["properties"].get(key, {})) <= kinds(kind):
                found.append(f"{name}.{key}")
        found += [f"{name}.{key}: always" for key in sorted({*old["required"]} - {*new["required"]})]
    return found


@pytest.mark.parametrize("command", output_schema.PRINTED)
def test_no_property_of_a_released_version_is_removed_retyped_or_made_optional(command: str) -> None:
    """A failure means: undo the change, or make a new version. A release writes its additions into the file."""
    assert PROMISED.keys() == output_schema.PRINTED.keys()
    assert broken(PROMISED[command], printed(command)) == []


def test_the_check_finds_each_change_that_is_no_addition_and_accepts_an_addition() -> None:
    device = "DeviceView"
    for change in ("removed", "renamed", "type", "null", "not always"):
        after = copy.deepcopy(printed("status"))
        properties = after["$defs"][device]["properties"]
        match change:
            case "removed":
                del properties["uuid"]
            case "renamed":
                properties["id"] = properties.pop("uuid")
            case "type":
                properties["uuid"] = {"type": "integer"}
            case "null":
                properties["uuid"] = {"anyOf": [{"type": "string"}, {"type": "null"}]}
            case _:
                after["$defs"][device]["required"].remove("uuid")
        assert [found for found in broken(printed("status"), after) if found.startswith(f"{device}.uuid")], change
    added = copy.deepcopy(printed("status"))
    added["$defs"][device]["properties"]["new"] = {"type": "string"}
    assert broken(printed("status"), added) == []


@pytest.mark.parametrize("command", output_schema.PRINTED)
def test_schemas_are_valid_name_their_version_and_describe_each_type(command: str) -> None:
    schema = printed(command)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:fgpu:{command}:v{output_schema.VERSION}"
    for name, definition in schema["$defs"].items():
        assert definition["description"].endswith("."), name
        assert "None" not in definition["description"]


def documents() -> list[tuple[str, Any]]:
    """Return every command's output, made from a Snapshot with all parts and from an event."""
    log = EventLog()
    log.add("refused", tenant="a", pid=7, gpu=0, operation="memory", reason="limit", bytes=1009)
    status = json.loads(json.dumps(snapshot(), default=plain))
    rows = json.loads(json.dumps(tables.process_rows(status), default=plain))
    return [("status", status), ("ps", rows), ("events", log.since(0)["events"][0])]


@pytest.mark.parametrize(("command", "document"), documents(), ids=output_schema.PRINTED)
def test_outputs_follow_their_schema_which_refuses_a_missing_property(command: str, document: Any) -> None:
    schema = printed(command)
    jsonschema.validate(document, schema)
    (document[0] if command == "ps" else document).pop({"status": "devices", "ps": "pid", "events": "what"}[command])
    with pytest.raises(jsonschema.ValidationError, match="is a required property"):
        jsonschema.validate(document, schema)
