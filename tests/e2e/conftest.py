"""One simulated driver and one agent for the whole suite; every test leaves them as it found them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest

PLACES = ["host", *(["crun"] if shutil.which("crun") else []), "runc"]


@pytest.fixture(scope="session")
def programs() -> None:
    """Compiles the C programs beside this file."""
    harness.compile_programs()


@pytest.fixture(scope="package")
def service(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[harness.Service]:
    """The simulated driver (16 GiB, one device) and the agent."""
    with harness.Service.running(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def unharmed(service: harness.Service) -> Iterator[None]:
    """Agent and gatekeeper stand; after the test they still do, and no process is left in the ledger or the driver."""
    service.stand()
    yield
    service.check()
    assert service.gatekeepers(), "no gatekeeper"
    harness.eventually(lambda: not harness.driver_books(), 20, "an empty driver")

    def none_left() -> bool:
        return not any(t["processes"] or t["orphans"] for t in harness.ask(verb="snapshot")["tenants"])

    harness.eventually(none_left, 10, "an empty ledger")


@pytest.fixture
def strict(service: harness.Service, unharmed: None) -> Iterator[harness.Service]:
    """The agent refuses what does not fit on a device."""
    said = service.config.read_text()
    service.config.write_text(said.replace("overcommit: allow", "overcommit: forbid"))
    service.kill_agent()
    service.start_agent()
    yield service
    service.config.write_text(said)
    service.kill_agent()
    service.start_agent()


def order(fault: str) -> None:
    """The simulated driver behaves like this from now on."""
    subprocess.run([harness.SIM / "fgpu-simd", "--fault", fault], check=True, timeout=10)


@pytest.fixture
def fault(unharmed: None) -> Iterator[Callable[[str], None]]:
    """Faults of the driver, which end with the test."""
    yield order
    order("reset")


@pytest.fixture
def place(request: pytest.FixtureRequest, unharmed: None, tmp_path: Path) -> Iterator[harness.Place]:
    """Where tenants live; which one is the test's parameter. None of their cgroups is left."""
    place = harness.place_of(request.param, tmp_path)
    yield place
    place.close()
    assert not place.left()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test with a `place` runs in each of them, or in those that its mark `places` names; quick: in the last."""
    if "place" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("places")
    wanted = list(mark.args if mark else PLACES)
    if os.environ.get("FGPU_TEST_SCALE") == "quick" and not metafunc.definition.get_closest_marker("every_place"):
        wanted = wanted[-1:]
    metafunc.parametrize("place", wanted, indirect=True)


@pytest.fixture
def tenant(place: harness.Place) -> Callable[[int], harness.Tenant]:
    """Makes tenants in the place of the test."""
    return place.tenant
