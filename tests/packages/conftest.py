"""A simulated driver, and the packages as `./dev package` makes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fresh_host
from tests.support import packages as kit


@pytest.fixture(scope="module")  # not the session's: other suites start one of their own
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


@pytest.fixture(scope="session")
def trixie_deb(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian 13's package, made there: `./dev package deb` makes one for the distribution on which it runs."""
    host = fresh_host.Host(tmp_path_factory.mktemp("builder"), "trixie")
    wheel = fresh_host.BUILD / kit.package("fgpu_ebpf-*.whl").relative_to(kit.BUILD)
    settings = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    try:
        host.mount()
        host.apt("update")
        host.apt("install", "python3-pip")
        for path in (
            kit.ROOT,
            Path("/etc/pip.conf"),
            Path(settings.get("PIP_CERT", "/etc/ssl/certs/ca-certificates.crt")),
        ):
            if path.exists():
                host.show(path, "--options", "ro")
        command = [kit.ROOT / "deploy/debian/build", "/usr/bin/python3", wheel, fresh_host.BUILD / "packages/trixie"]
        host.run(*command, env={"PATH": host.environment["PATH"], **settings}, timeout=170)
    finally:
        host.close()
    return kit.package("trixie/fgpu_*.deb")
