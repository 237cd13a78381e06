"""The chart's schema of `settings` has the keys of agent.yaml."""

from __future__ import annotations

import json
from pathlib import Path

from fgpu_ebpf.agent.host_schema import HostDocument

SCHEMA = Path(__file__).parents[2] / "deploy/helm/fgpu/values.schema.json"


def test_the_chart_s_settings_have_exactly_the_keys_of_agent_yaml() -> None:
    settings = json.loads(SCHEMA.read_text())["properties"]["settings"]["properties"]
    assert set(settings) == {field.alias for field in HostDocument.model_fields.values()}
