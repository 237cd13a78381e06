"""A simulated driver, and the packages as `./dev package` makes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fresh_host
from tests.support import packages as kit

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count the time of a test without its fixtures, which build packages and roots for all tests of a file."""
    for item in items:
        if item.path.is_relative_to(HERE) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(float(item.config.getini("timeout")), func_only=True))


@pytest.fixture(scope="module")  # not of the session: other suites start their own driver
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run fgpu-simd with one device of 16 GiB."""
    with kit.driver(tmp_path_factory.mktemp("driver") / "log", "16GiB", 5):
        yield


@pytest.fixture(scope="module")
def host(driver: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[fresh_host.Host]:
    """Return an empty host with up-to-date lists of packages."""
    host = fresh_host.Host(tmp_path_factory.mktemp("host"))
    try:
        host.mount()
        host.apt("update")
        yield host
    finally:
        host.close()


def _packaged(kind: str) -> None:
    kit.run(kit.ROOT / "dev", "package", kind, timeout=600)


@pytest.fixture(scope="session")
def wheel() -> Path:
    """Return the wheel of this tree."""
    _packaged("wheel")
    return kit.package("fgpu_ebpf-*.whl")


@pytest.fixture(scope="session")
def deb() -> Path:
    """Return the Debian package of this tree."""
    _packaged("deb")
    return kit.package("fgpu_*.deb")
