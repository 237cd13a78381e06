"""The rows of docs/security.md, and the tests that they name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| ([TF]\d+) \|.*\| (.*) \|$", re.MULTILINE)
TEST = re.compile(r"`([\w/]+\.py::\w+)`")


def named_of_rows() -> dict[str, list[str]]:
    """Return the tests that each row names, by the row's name, in the order of the page."""
    rows = ROW.findall((ROOT / "docs/security.md").read_text(encoding="utf-8"))
    return {row: [f"tests/{test}" for test in TEST.findall(cell)] for row, cell in rows}
