"""A container's image has a limit, and its host has an agent that it cannot reach. The agent reports both facts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import standalone as kit
from tests.support.commands import fgpu, metrics
from tests.support.host import GIB, MIB
from tests.support.service import Service
from tests.support.wait import eventually


@pytest.fixture
def images(service: Service, tmp_path: Path) -> Iterator[kit.Images]:
    """Yield containers of such an image."""
    place = kit.Images(tmp_path, "runc")
    yield place
    place.close()


def test_the_image_s_limit_applies_and_the_agent_reports_cooperative_mode(images: kit.Images) -> None:
    tenant = images.tenant(6 * GIB)
    tenant.assert_enforced()
    client = kit.assert_live(tenant)
    client.ok(f"alloc {256 * MIB}")
    key = "fgpu_tenant_enforcement", frozenset({("tenant", tenant.name), ("mode", "cooperative")})
    eventually(lambda: metrics().get(key) == 1, 10, "the mode `cooperative`")
    assert tenant.view()["bypassing"] == {"standalone": 1}
    eventually(lambda: tenant.memory()["used_bytes"] == tenant.driver(), 5, "the charge of the program's memory")
    said = json.loads(fgpu("explain", tenant.path, "--json").stdout)
    assert said["enforcement"] == "cooperative"
    assert any(f"pid {client.pid} found no agent" in line for line in said["stronger"])
    client.kill()
    tenant.assert_enforced()
