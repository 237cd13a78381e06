"""The files that start Prometheus and Grafana: named files exist, and the files refer to each other correctly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import FOLDER, NAMES
from .prometheus_kit import promtool

SERVICE_KEYS = {"image", "network_mode", "restart", "command", "volumes", "environment", "depends_on"}


def read(*names: str) -> Any:
    return yaml.safe_load(Path(FOLDER, *names).read_text())


@pytest.fixture
def services() -> dict[str, dict[str, Any]]:
    return dict(read("compose.yaml")["services"])


def mounted(service: dict[str, Any]) -> dict[str, str]:
    """Return the sources of mounts by their targets."""
    found = [volume.split(":") for volume in service["volumes"]]
    return {target: source for source, target, *_ in found}


def test_prometheus_accepts_its_configuration_and_the_rules(
    tmp_path: Path, services: dict[str, dict[str, Any]]
) -> None:
    here = mounted(services["prometheus"])
    config = read("prometheus.yaml")
    assert (
        f"--config.file={next(t for t, s in here.items() if s == './prometheus.yaml')}"
        in services["prometheus"]["command"]
    )
    assert [here[path] for path in config["rule_files"]] == ["./rules.yaml"]
    config["rule_files"] = [str(FOLDER / "rules.yaml")]  # where it would be mounted
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    assert "SUCCESS" in promtool("check", "config", "prometheus.yaml", cwd=tmp_path)


def test_compose_services_have_known_keys_and_their_mounted_files_exist(services: dict[str, dict[str, Any]]) -> None:
    volumes = read("compose.yaml")["volumes"]
    for service in services.values():
        assert service.keys() <= SERVICE_KEYS
        assert ":" in service["image"]
        assert set(service.get("depends_on", [])) <= services.keys()
        for source in mounted(service).values():
            assert source in volumes or (FOLDER / source).exists(), source


def test_grafana_finds_every_dashboard_and_prometheus(services: dict[str, dict[str, Any]]) -> None:
    here = mounted(services["grafana"])
    (provider,) = read("provisioning", "dashboards", "fgpu.yaml")["providers"]
    path = provider["options"]["path"]
    assert provider["type"] == "file"
    assert {here.get(f"{path}/{name}.json") for name in NAMES} == {f"./{name}.json" for name in NAMES}
    (source,) = read("provisioning", "datasources", "prometheus.yaml")["datasources"]
    address = source["url"].removeprefix("http://")
    assert source["type"] == "prometheus"
    assert f"--web.listen-address={address}" in services["prometheus"]["command"]
    assert source["jsonData"]["httpMethod"] == "POST", "queries with many tenants are too long for GET"
    assert source["jsonData"]["timeInterval"] == read("prometheus.yaml")["global"]["scrape_interval"]
