"""The output of `--json` follows `fgpu schema`, and a schema keeps the promises of its version."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from fgpu_ebpf.cli import output_schema, tables
from fgpu_ebpf.cli import usage as usage_command
from fgpu_ebpf.cli.main import main
from fgpu_ebpf.snapshot import plain
from fgpu_ebpf.tenancy import usage_store
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.usage_store import Owner, Place, Used
from tests.unit.snapshot_kit import snapshot

VERSION = 1
PROMISED: dict[str, Any] = json.loads(Path(__file__).with_name(f"output_v{VERSION}.json").read_text())
Schema = dict[str, Any]
AMOUNTS = ("run_seconds", "memory_byte_seconds", "held_seconds", "idle_seconds", "waited_seconds")
A_FIELD = {"status": "devices", "ps": "pid", "usage": "held_seconds", "events": "what"}


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
    usage = [{"tenant": "a", "source": "turns"} | dict.fromkeys(AMOUNTS, 1.5)]
    return [("status", status), ("ps", rows), ("usage", usage), ("events", log.since(0)["events"][0])]


@pytest.mark.parametrize(("command", "document"), documents(), ids=output_schema.PRINTED)
def test_outputs_follow_their_schema_which_refuses_a_missing_property(command: str, document: Any) -> None:
    schema = printed(command)
    jsonschema.validate(document, schema)
    (document[0] if isinstance(document, list) else document).pop(A_FIELD[command])
    with pytest.raises(jsonschema.ValidationError, match="is a required property"):
        jsonschema.validate(document, schema)


@pytest.mark.parametrize("by", ["tenant", "namespace", "user", "label:team"])
def test_usage_prints_its_schema_the_name_of_the_group_and_null_for_what_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    owner, now = Owner("a", "research", "1000", (("team", "vision"),)), usage_store.period(time.time())
    amounts = {Place(now, owner, "GPU-a", source): Used(2.0, 3.0, 4.0, 1.0, 0.5) for source in ("turns", "none")}
    usage_store.add(tmp_path / "usage.db", amounts)
    monkeypatch.setattr(usage_store.read, "__defaults__", (tmp_path / "usage.db",))
    monkeypatch.setattr(usage_store.begin, "__defaults__", (tmp_path / "usage.db",))
    monkeypatch.setattr(usage_command.os, "geteuid", lambda: 0)
    rows = json.loads(CliRunner().invoke(main, ["usage", "--json", "--by", by]).output)
    jsonschema.validate(rows, printed("usage"))
    group = {"tenant": "a", "namespace": "research", "user": "1000", "label:team": "vision"}[by]
    assert sorted((row[by], row["source"], row["run_seconds"], row["idle_seconds"]) for row in rows) == [
        (group, "none", None, None), (group, "turns", 2.0, 1.0),
    ]  # fmt: skip
    lines = CliRunner().invoke(main, ["usage", "--csv", "--by", by]).output.splitlines()
    assert {f"{group},turns,2.0,3.0,4.0,1.0,0.5", f"{group},none,,3.0,4.0,,0.5"} == {*lines[1:]}
