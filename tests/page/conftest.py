"""The simulated driver with two devices, the agent, and a browser that opens its page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.page.page_kit import HOST, URL, Looker
from tests.support import host
from tests.support.commands import orphans
from tests.support.host import FGPU
from tests.support.place import Place
from tests.support.service import Service, compile_programs
from tests.support.wait import eventually

FOLDER = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"  # the distribution's


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option: `./dev test page --picture FILE` makes the picture that the documentation shows."""
    parser.addoption("--picture", type=Path, help="where to put a picture of the status page")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run only the picture if one is requested, and otherwise all tests except the picture."""
    is_asked = bool(config.getoption("picture", None))
    left_out = [item for item in items if item.path.parent == FOLDER and (item.name == "test_picture") is not is_asked]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The simulated driver (two devices of 140 GiB) and the agent, on a host with the name HOST."""
    compile_programs()
    service = Service(tmp_path_factory.mktemp("service"), ["docker"])
    service.config.write_text(f"{service.config.read_text()}listenNames: [page.example]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "GPUS", "2")
        try:
            service.start_driver("140GiB")
            service.command = ["unshare", "--uts", "sh", "-c", f'hostname {HOST} && exec "$@"', "sh", *FGPU]
            service.start_agent()
            yield service
        finally:
            service.stop()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Start Chromium without a window. As root it runs only without its sandbox."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def look(service: Service, browser: Browser) -> Iterator[Callable[..., Looker]]:
    """Return look(query, width=…), which opens the page in a new window.

    Check that it contacts no other host and has no errors.
    """
    with contextlib.ExitStack() as opened:

        def opening(query: str = "", **more: object) -> Looker:
            return opened.enter_context(Looker.at(browser, URL + query, **more))  # type: ignore[arg-type]

        yield opening


@pytest.fixture
def place(service: Service, tmp_path: Path) -> Iterator[Place]:
    """Return a place for tenants on the host."""
    place = Place(tmp_path)
    yield place
    place.close()
    # Tenants whose cgroup was removed are shown as long as the driver holds their memory.
    eventually(lambda: not orphans(), 10, "the release of the tenants' memory")
