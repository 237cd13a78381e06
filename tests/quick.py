"""The files of `./dev test quick`: `python -m tests.quick` prints them, and on stderr a text about the other tests.

They are the files of unit tests that take less than MOST_SECONDS, and one file for each step from a policy to the
kernel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.schedule import DURATIONS, TESTS

MOST_SECONDS = 3  # the longest time of a file of unit tests, by DURATIONS
STEPS = ("bpf/test_ledger.py", "gatekeeper/test_hello.py", "e2e/test_limit.py", "e2e/test_policies.py")


def chosen() -> list[str]:
    """Return the files, by their paths in the repository."""
    seconds: dict[str, float] = json.loads(DURATIONS.read_text())
    units = [_name(path) for path in sorted((TESTS / "unit").rglob("test_*.py"))]
    return [name for name in units if seconds.get(name, 0) < MOST_SECONDS] + [f"tests/{step}" for step in STEPS]


def left_out(files: list[str]) -> str:
    """Return a text about the tests that are not among these files."""
    every = [_name(path) for path in TESTS.rglob("test_*.py")]
    suites = sorted({Path(name).parts[1] for name in every} - {Path(name).parts[1] for name in files})
    return (
        f"{len(files)} of {len(every)} files, with the smallest counts. Left out: all of {', '.join(suites)}; "
        f"of bpf, gatekeeper and e2e all but {', '.join(STEPS)}; unit tests that take {MOST_SECONDS} s or more"
    )


def _name(path: Path) -> str:
    return str(path.relative_to(TESTS.parent))


if __name__ == "__main__":
    print(*chosen())
    print(f"dev: quick: {left_out(chosen())}", file=sys.stderr)
