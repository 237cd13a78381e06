"""The simulated driver with two devices, the agent, and a browser that looks at its page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest
from page_kit import URL, Looker
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = "/usr/bin/chromium"  # the distribution's


def pytest_addoption(parser: pytest.Parser) -> None:
    """`./dev test page --picture FILE` makes the picture that the documentation shows."""
    parser.addoption("--picture", type=Path, help="where to put a picture of the status page")


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[harness.Service]:
    """The simulated driver (two devices of 16 GiB) and the agent."""
    harness.compile_programs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "GPUS", "2")
        with harness.Service.running(tmp_path_factory.mktemp("service"), "docker") as service:
            yield service


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium without a window; as root it runs without its sandbox or not at all."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def look(service: harness.Service, browser: Browser) -> Iterator[Callable[..., Looker]]:
    """look(query, width=…): the page in a window of its own. Afterwards: nothing went elsewhere, nothing was wrong."""
    with contextlib.ExitStack() as opened:

        def opening(query: str = "", **more: object) -> Looker:
            return opened.enter_context(Looker.at(browser, URL + query, **more))  # type: ignore[arg-type]

        yield opening


@pytest.fixture
def place(service: harness.Service, tmp_path: Path) -> Iterator[harness.Place]:
    """Tenants on the host."""
    place = harness.Place(tmp_path)
    yield place
    place.close()
