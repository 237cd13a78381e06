"""Tests of tests/quick.py: which files `./dev test quick` runs."""

from __future__ import annotations

import json

from tests import quick
from tests.schedule import DURATIONS, TESTS

MOST_IN_ALL = 180  # seconds of the chosen files in a whole run; with three workers, they take a third of this


def test_quick_chooses_files_of_less_than_180_seconds_and_lists_every_other_suite() -> None:
    files, seconds = quick.chosen(), json.loads(DURATIONS.read_text())
    assert all((TESTS.parent / file).is_file() for file in files)
    assert sum(seconds.get(file, 0) for file in files) < MOST_IN_ALL
    said = quick.left_out(files)
    suites = {folder.name for folder in TESTS.iterdir() if any(folder.glob("test_*.py"))}
    assert all(name in said for name in suites - {"unit"})
