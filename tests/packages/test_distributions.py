"""The Debian package of this tree on other distributions: the one file installs, enforces and is removed there too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fresh_host
from tests.support import packages as kit

pytestmark = pytest.mark.skipif(
    os.environ.get("FGPU_TEST_SCALE") != "full", reason="a root of another distribution takes minutes"
)
PYTHONS = {"trixie": "3.13"}
NETBASE = {"etc/hosts", "etc/networks"}  # created by a dependency of BCC when it is installed


@pytest.fixture(params=PYTHONS)
def other(
    request: pytest.FixtureRequest, driver: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[fresh_host.Host]:
    """Return an empty host of another distribution."""
    host = fresh_host.Host(tmp_path_factory.mktemp("other"), request.param)
    try:
        host.mount()
        host.apt("update")
        yield host
    finally:
        host.close()


@pytest.mark.timeout(600)
def test_install_enforce_purge_works_on_other_distributions(
    other: fresh_host.Host, deb: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before = fresh_host.listing(other.root)
    other.install(deb)
    version = other.run("python3", "-c", "import sys; print(*sys.version_info[:2], sep='.')").stdout.strip()
    assert version == PYTHONS[request.node.callspec.params["other"]]
    other.start_agent(tmp_path / "log")
    kit.assert_enforced(other, "other")
    assert other.run("dpkg", "--verify", "fgpu").stdout == ""
    other.apt("purge", "fgpu")
    assert set(other.left(before)) <= NETBASE
    assert other.pins() == []
