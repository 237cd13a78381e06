"""Run pytest in a folder with a copy of the files that all suites share, and with one suite of one file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
FILES = (
    *("__init__.py", "conftest.py", "durations.json", "hang.py", "rows.py", "schedule.py", "trials.py", "world.py"),
    *("support/__init__.py", "support/wait.py"),
)


def asked_of_copy(work: Path, tests: str, conftest: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in `work`, on a suite of one file with the text `tests`. `conftest` is the suite's conftest.py."""
    folder = work / "tests/sim"
    folder.mkdir(parents=True)
    (work / "tests/support").mkdir()
    for name in FILES:
        shutil.copy(TESTS / name, work / "tests" / name)
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_some.py").write_text(tests)
    environment = {name: value for name, value in os.environ.items() if name != "FGPU_TEST_WORLDS"}
    command = [sys.executable, "-m", "pytest", f"--rootdir={work}", *options, "tests"]
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=120, check=False)
