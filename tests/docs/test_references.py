"""Reference pages contain every metric, key, command and field, each with a description."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest

from docs.hooks import references
from fgpu_ebpf.agent import host_schema
from fgpu_ebpf.cli import output_schema
from fgpu_ebpf.policy import schema as policy_schema
from tests.support.host import ROOT


@pytest.fixture(scope="module")
def shown(site: Path) -> dict[str, str]:
    """Return the text of the reference pages."""
    return {path.stem: path.read_text() for path in (site / "reference").glob("*.html")}


def test_every_metric_is_shown(shown: dict[str, str]) -> None:
    golden = (ROOT / "tests/unit/api/metrics.txt").read_text()
    for name in re.findall(r"^# TYPE (\w+) ", golden, re.MULTILINE):
        assert f"<code>{name}</code>" in shown["metrics"], name


def test_every_metric_has_a_description_and_its_labels(shown: dict[str, str]) -> None:
    for family in references.families():
        assert family.documentation, family.name
        for label in family._labelnames:
            assert f"<code>{label}</code>" in shown["metrics"], (family.name, label)


def test_every_metric_of_the_dashboards_is_shown(shown: dict[str, str]) -> None:
    files = [*(ROOT / "dashboards").rglob("*.json"), ROOT / "dashboards/rules.yaml"]
    asked = {name for file in files for name in re.findall(r"\bfgpu_[a-z_]+\b", file.read_text())}
    known = {references.exposed(family) for family in references.families()}
    asked = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert len(asked & known) > 20
    recorded = set(re.findall(r"record: (\w+)", (ROOT / "dashboards/rules.yaml").read_text()))
    assert asked - known - recorded == set()


def keys(schema: object) -> set[str]:
    """Return every key of a schema."""
    found: set[str] = set()
    if isinstance(schema, dict):
        found |= set(schema.get("properties", ()))
        for inner in schema.values():
            found |= keys(inner)
    elif isinstance(schema, list):
        for inner in schema:
            found |= keys(inner)
    return found


def test_every_key_is_shown(shown: dict[str, str]) -> None:
    wanted = keys(policy_schema.json_schema()) | keys(host_schema.HostDocument.model_json_schema())
    assert len(wanted) > 30
    for key in wanted:
        assert f"<code>{key}</code>" in shown["policy"], key


def test_each_key_of_the_policy_schema_has_a_description() -> None:
    """Editors show the descriptions of `fgpu policy schema`."""
    schema = policy_schema.json_schema()
    for model in (schema, *schema["$defs"].values()):
        for key, said in model["properties"].items():
            assert said.get("description") or "$ref" in said, (model["title"], key)


def test_every_command_and_option_has_a_description_and_is_shown(shown: dict[str, str]) -> None:
    found = dict(references.commands())
    assert len(found) > 20
    assert "\b" not in shown["cli"], "the page has click's mark for an unwrapped paragraph"
    for words, command in found.items():
        assert command.help, words
        assert f'id="{words.replace(" ", "-")}"' in shown["cli"], words
        for option in references.options(command):
            assert option.help, (words, option.name)
            for name in option.opts:
                assert f"<code>{name}</code>" in shown["cli"], (words, name)


def test_a_key_without_a_description_fails_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_schema.Views.model_fields["utilization"], "description", None)
    with pytest.raises(AssertionError, match="utilization does not say what it is"):
        references.policy()


JSON_PAGE = (ROOT / "docs/reference/json.md").read_text()


def test_every_field_of_json_output_is_shown(shown: dict[str, str]) -> None:
    for command in output_schema.PRINTED:
        for name, definition in output_schema.of(command)["$defs"].items():
            assert f'id="{name.lower()}"' in shown["json"], name
            for field in definition["properties"]:
                assert f"<code>{field}</code>" in shown["json"], (name, field)


def test_examples_of_json_output_follow_the_schema() -> None:
    row, use, event = (json.loads(text) for text in re.findall(r"^```json\n(.*?)^```", JSON_PAGE, re.M | re.S))
    jsonschema.validate([row], output_schema.of("ps"))
    jsonschema.validate([use], output_schema.of("usage"))
    jsonschema.validate(event, output_schema.of("events"))


@pytest.mark.skipif(not shutil.which("jq"), reason="no jq")
def test_jq_filters_of_the_page_print_the_expected_results() -> None:
    devices = [{"gpu": 0, "used_bytes": 90, "limit_bytes": 100}, {"gpu": 1, "used_bytes": 89, "limit_bytes": 100}]
    tenants = [{"tenant": "a", "devices": devices}]
    status = json.dumps({"tenants": tenants, "unenforced": "", "incomplete": "a fault"})
    said = []
    for option, text in re.findall(r"^ {4}fgpu status --json \| jq (-\w) '(.*)'$", JSON_PAGE, re.MULTILINE):
        done = subprocess.run(["jq", option, text], input=status, capture_output=True, text=True, check=False)
        said.append((done.returncode, done.stdout))
    assert said == [(0, "a gpu 0\n"), (1, "false\n")]
