"""The simulated driver for this suite, and no agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import standalone as kit
from tests.support.service import Service, compile_programs
from tests.support.sim_driver import driver_books
from tests.support.wait import eventually


@pytest.fixture(scope="package", autouse=True)
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run the simulated driver with one device of 16 GiB."""
    compile_programs()
    service = Service(tmp_path_factory.mktemp("service"))
    try:
        service.start_driver()
        yield
    finally:
        service.stop()


@pytest.fixture(params=["runc", "crun"])
def images(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[kit.Images]:
    """Return containers of one image. All that they held is freed with them."""
    place = kit.Images(tmp_path, request.param)
    yield place
    place.close()
    eventually(lambda: not driver_books(), 10, "an empty driver")
