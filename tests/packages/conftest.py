"""A simulated driver, and the packages as `./dev package` makes them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import host_kit
import package_kit as kit
import pytest


@pytest.fixture(scope="module")  # not the session's: other suites start one of their own
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """fgpu-simd, 16 GiB, one device."""
    path = tmp_path_factory.mktemp("driver") / "log"
    with open(path, "wb") as log:
        environment = {"FGPU_SIM_MEMORY": "16GiB", "FGPU_SIM_GPUS": "1"}
        driver = subprocess.Popen([kit.BUILD / "sim/fgpu-simd"], stdout=log, stderr=log, env=environment)
    try:
        kit.eventually(lambda: b"ready" in path.read_bytes() or driver.poll() is not None, 5, "the driver")
        assert driver.poll() is None, path.read_text()
        yield
    finally:
        driver.terminate()
        driver.wait(10)


@pytest.fixture(scope="module")
def host(driver: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[host_kit.Host]:
    """A host with nothing on it, whose lists of packages are of today."""
    host = host_kit.Host(tmp_path_factory.mktemp("host"))
    try:
        host.mount()
        host.apt("update")
        yield host
    finally:
        host.close()


def _packaged(kind: str) -> None:
    kit.run(kit.ROOT / "dev", "package", kind, timeout=170)


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The wheel of this tree."""
    _packaged("wheel")
    return kit.package("fgpu_ebpf-*.whl")


@pytest.fixture(scope="session")
def deb() -> Path:
    """The Debian package of this tree."""
    _packaged("deb")
    return kit.package("fgpu_*.deb")
