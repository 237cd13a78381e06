"""The picture that the documentation shows: `./dev test page --picture docs/pictures/status-page.png`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.page import page_load
from tests.page.page_kit import Looker

MOST_BYTES = 200_000


def test_picture(look: Callable[..., Looker], tmp_path: Path, pytestconfig: pytest.Config) -> None:
    picture = pytestconfig.getoption("picture").resolve()
    with page_load.applied(tmp_path):
        there = look(width=1100, color_scheme="light")
        expect(there.page.locator(".device .turn")).to_have_count(1)
        expect(there.page.locator(".notes")).to_have_count(1)
        picture.parent.mkdir(parents=True, exist_ok=True)
        there.page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size < MOST_BYTES
