"""The simulated driver and the agent for this suite, and engines that start when the first test needs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containers import engines as kit
from tests.support.service import Service, compile_programs
from tests.support.sim_driver import driver_books
from tests.support.wait import eventually


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The simulated driver (16 GiB, one device) and the agent."""
    compile_programs()
    with Service.running(tmp_path_factory.mktemp("service"), "docker", "podman", "cri") as service:
        yield service


@pytest.fixture
def unharmed(service: Service) -> Iterator[None]:
    """Check that agent and gatekeeper run before and after the test, and that the driver is empty."""
    service.stand()
    yield
    service.check()
    assert service.gatekeepers(), "no gatekeeper"
    eventually(lambda: not driver_books(), 10, "an empty driver")


@pytest.fixture(scope="package")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root file system with glibc and a shell."""
    return kit.make_root(tmp_path_factory.mktemp("image") / "root")


@pytest.fixture(scope="package", params=kit.ALL)
def engine(
    request: pytest.FixtureRequest, service: Service, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[kit.Engine]:
    """Yield an engine with the image `plain`."""
    work = tmp_path_factory.mktemp(request.param)
    cave = kit.Cave(work, service.cdi)
    try:
        found = kit.ALL[request.param](cave, work)
        try:
            found.load(image, "plain")
            yield found
        finally:
            found.close()
    finally:
        cave.close()
