"""The chart's schema of `settings` has the keys of agent.yaml, and its files equal those of `dashboards`."""

from __future__ import annotations

import json
from pathlib import Path

from fgpu_ebpf.agent.host_schema import HostDocument
from fgpu_ebpf.policy.requests import ADAPTERS

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/fgpu"
SCHEMA = CHART / "values.schema.json"
MADE = "policy.schema.json"  # a file of the chart that is none of `dashboards`: tests/kubernetes/test_chart.py


def test_the_chart_s_settings_have_exactly_the_keys_of_agent_yaml() -> None:
    settings = json.loads(SCHEMA.read_text())["properties"]["settings"]["properties"]
    assert set(settings) == {field.alias for field in HostDocument.model_fields.values()}
    assert settings["adapters"]["items"]["enum"] == list(ADAPTERS)


def test_the_chart_has_copies_of_the_dashboards_and_rules() -> None:
    """Copies, because helm prints a line for each symbolic link."""
    copies = {path.name: path for path in (CHART / "files").iterdir() if path.name != MADE}
    wanted = {path.name for path in (ROOT / "dashboards").glob("*.json")} | {"rules.yaml"}
    assert set(copies) == wanted
    for name, path in copies.items():
        command = f"cp dashboards/{name} deploy/helm/fgpu/files/"
        assert path.read_bytes() == (ROOT / "dashboards" / name).read_bytes(), f"run {command}"
    assert [path.name for path in CHART.rglob("*") if path.is_symlink()] == []
