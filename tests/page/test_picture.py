"""The pictures in the documentation: `./dev test page --picture docs/pictures/status-page.png`.

The picture of `fgpu top` is written beside it, as `top.png`.
"""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from rich.console import Console
from rich.text import Text

from tests.page import page_load
from tests.page.page_kit import Looker
from tests.support.host import ENVIRONMENT

MOST_BYTES = 200_000
COLUMNS = 100


def top() -> str:
    """Return the output of `fgpu top` on a terminal, as SVG without fonts of other hosts."""
    typed = f"stty cols {COLUMNS}; fgpu top -1"
    environment = {**ENVIRONMENT, "TERM": "xterm-256color"}
    script = ["script", "--quiet", "--return", "--command", typed, "/dev/null"]
    printed = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=30, check=True).stdout
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(printed))
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="fgpu top"), flags=re.DOTALL)


def test_picture(look: Callable[..., Looker], browser: Browser, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    picture = pytestconfig.getoption("picture").resolve()
    picture.parent.mkdir(parents=True, exist_ok=True)
    pictures = picture, picture.with_name("top.png")
    with page_load.applied(tmp_path):
        there = look(width=1100, color_scheme="light")
        expect(there.page.locator(".device .turn")).to_have_count(1)
        expect(there.page.locator(".notes")).to_have_count(1)
        there.page.screenshot(path=pictures[0], full_page=True)
        page = browser.new_page(viewport={"width": 1000, "height": 600})
        page.set_content(f"<style>svg {{ width: 900px }}</style>{top()}")
        page.locator("svg").first.screenshot(path=pictures[1])
        page.close()
    assert all(0 < made.stat().st_size < MOST_BYTES for made in pictures)
