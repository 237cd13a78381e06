"""The simulated driver and the agent for this suite, and the dashboards as Grafana reads them."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.host import ROOT
from tests.support.service import Service, compile_programs

FOLDER = ROOT / "dashboards"
NAMES = ("cluster", "node", "tenant", "usage")


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The simulated driver (16 GiB, one device) and the agent."""
    compile_programs()
    with Service.running(tmp_path_factory.mktemp("service"), "docker") as service:
        yield service


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the functions that make.py defines."""
    monkeypatch.syspath_prepend(FOLDER)
    return runpy.run_path(str(FOLDER / "make.py"))


@pytest.fixture(scope="package")
def dashboards() -> dict[str, dict[str, Any]]:
    """Return the dashboards by name."""
    return {name: json.loads(Path(FOLDER, f"{name}.json").read_text()) for name in NAMES}
