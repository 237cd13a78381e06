"""One simulated driver and one agent for the whole suite. Every test restores the state of both."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.e2e import combination_kit, concurrent_kit, layout_kit, making_room_kit
from tests.e2e.held_kit import Held
from tests.e2e.parking_kit import Parker, parking
from tests.e2e.policies_kit import GROUP, POLICY, Write, is_good, reloads
from tests.e2e.spin_kit import Spin
from tests.support.commands import ask, metrics
from tests.support.containers.docker import Docker
from tests.support.host import BUILD, SIM
from tests.support.place import Cgroups, Place, place_of
from tests.support.service import Service, compile_programs
from tests.support.sim_driver import driver_books
from tests.support.tenant import Tenant
from tests.support.wait import eventually

LAST_LINES = 40
PLACES = ["host", *(["crun"] if shutil.which("crun") else []), "runc"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the last lines of the agent's log to the traceback of a failed test."""
    report = yield
    service = getattr(item, "funcargs", {}).get("service")
    if report.failed and service and hasattr(report.longrepr, "addsection"):
        lines = service.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        report.longrepr.addsection("the agent's log", "\n".join(lines))
    return report


@pytest.fixture(scope="session")
def programs() -> None:
    """Compile the C programs of tests/programs."""
    compile_programs()


@pytest.fixture(scope="package")
def service(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The simulated driver (16 GiB, one device) and the agent."""
    with Service.running(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="session")
def versions(programs: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[layout_kit.Version, layout_kit.Version]:
    """Return this version, and a version with the next layout of pages."""
    work = tmp_path_factory.mktemp("versions")
    return layout_kit.version(work / "this", 0), layout_kit.version(work / "next", 1)


@pytest.fixture
def unharmed(service: Service) -> Iterator[None]:
    """Check that agent and gatekeeper run before and after the test, and that ledger and driver are empty."""
    service.stand()
    yield
    service.check()
    assert service.gatekeepers(), "no gatekeeper"
    eventually(lambda: not driver_books(), 20, "an empty driver")

    def none_left() -> bool:
        return not any(t["processes"] or t["orphans"] for t in ask(verb="snapshot")["tenants"])

    eventually(none_left, 10, "an empty ledger")


@pytest.fixture
def strict(service: Service, unharmed: None) -> Iterator[Service]:
    """Restart the agent so that it refuses limits that do not fit on a device."""
    said = service.config.read_text()
    service.config.write_text(said.replace("overcommit: allow", "overcommit: forbid"))
    service.kill_agent()
    service.start_agent()
    yield service
    service.config.write_text(said)
    service.kill_agent()
    service.start_agent()


@pytest.fixture
def feature_places(strict: Service, tmp_path: Path) -> Iterator[tuple[Cgroups, Docker]]:
    """Return the places of the tenants of `columns`."""
    with combination_kit.made_places(strict, tmp_path) as places:
        yield places


@pytest.fixture
def columns(feature_places: tuple[Cgroups, Docker]) -> dict[str, Held]:
    """Return the columns of the table of combinations, by the names of features in the table."""
    return combination_kit.held(combination_kit.started(*feature_places))


def order(fault: str) -> None:
    """Set the faults of the simulated driver, which apply immediately."""
    subprocess.run([SIM / "fgpu-simd", "--fault", fault], check=True, timeout=30)


@pytest.fixture
def fault(unharmed: None) -> Iterator[Callable[[str], None]]:
    """Return a function that sets faults of the driver. The faults are removed after the test."""
    yield order
    order("reset")


@pytest.fixture
def place(request: pytest.FixtureRequest, unharmed: None, tmp_path: Path) -> Iterator[Place]:
    """Return the place in which the test's tenants live (the test's parameter).

    Remove all of its cgroups afterwards.
    """
    place = place_of(request.param, tmp_path)
    yield place
    place.close()
    assert not place.left()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test with a `place` in every place, or in those of its mark `places`; a quick run uses only the last."""
    if "place" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("places")
    wanted = list(mark.args if mark else PLACES)
    if os.environ.get("FGPU_TEST_SCALE") == "quick" and not metafunc.definition.get_closest_marker("every_place"):
        wanted = wanted[-1:]
    metafunc.parametrize("place", wanted, indirect=True)


@pytest.fixture
def tenant(place: Place) -> Callable[[int], Tenant]:
    """Return a function that makes tenants in the place of the test."""
    return place.tenant


@pytest.fixture(scope="session")
def spin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the benchmark's program."""
    source, out = Path(__file__).parents[2] / "bench/programs/spin.c", tmp_path_factory.mktemp("spin") / "spin"
    flags = ["-std=gnu11", "-O2", f"-I{BUILD}/headers"]
    subprocess.run(["gcc", *flags, "-o", out, source, "-ldl"], check=True, timeout=60)
    return out


@pytest.fixture(scope="module")
def parker(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parker]:
    with parking(service, tmp_path_factory.mktemp("parker")) as made:
        yield made


@pytest.fixture(scope="module")
def room_parker(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parker]:
    """Return a parker, beside an agent that parks idle tenants for others."""
    with parking(service, tmp_path_factory.mktemp("parker"), "park") as made:
        yield made


@pytest.fixture
def turns(room_parker: Parker, write: Write, tmp_path: Path) -> Iterator[Cgroups]:
    """Return a place with tenants that use a small device in turn."""
    yield from making_room_kit.tenants(write, tmp_path)


@pytest.fixture
def concurrent(service: Service, unharmed: None) -> Iterator[Service]:
    """Return the service with a concurrent device."""
    yield from concurrent_kit.with_mps(service)


@pytest.fixture
def start(spin: Path, unharmed: None) -> Iterator[Callable[..., Spin]]:
    started: list[Spin] = []

    def make(name: str, *limits: str, **more) -> Spin:
        started.append(Spin(spin, name, *limits, **more))
        return started[-1]

    yield make
    for one in started:
        one.close()


@pytest.fixture
def write(service: Service, unharmed: None) -> Iterator[Write]:
    """Return a function that writes one policy file, and returns when the policy is in force."""

    def put(rest: str, name: str = "test", selector: str = f'{{cgroup: ["{GROUP}/*"]}}', file: str = "50.yaml") -> None:
        before = reloads()
        text = POLICY.format(name=name, selector=selector, rest=rest)
        (service.policies / file).write_text(text)
        eventually(lambda: reloads() > before, 5, "the policy in force")

    def none_in_force() -> bool:
        return is_good() and metrics()["fgpu_policies", frozenset()] == 0

    yield put
    for file in service.policies.iterdir():
        file.unlink()
    eventually(none_in_force, 5, "no policy in force")  # the agent may read the folder between two removals
