"""Write the table of docs/faults.md from the faults that the tests cause: `python -m tests.e2e.faults_page`.

tests/docs/test_faults.py compares the page with this module's output.
"""

from __future__ import annotations

import re

from tests.e2e import test_combinations, test_combinations_anew
from tests.e2e.combination_kit import COLUMNS
from tests.support.host import ROOT

PAGE = ROOT / "docs/faults.md"
TABLE = re.compile(r"^\| fault \|.*\n(?:\|.*\n)+", re.MULTILINE)


def table() -> str:
    """Return the table."""
    head = [f"| fault | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    during = [fault.row(name) for name, fault in test_combinations.FAULTS.items()]
    after = [fault.row(name) for name, fault in test_combinations_anew.FAULTS.items()]
    return "\n".join([*head, *during, *after, ""])


def main() -> None:
    """Replace the table in the page."""
    text, found = TABLE.subn(lambda _: table(), PAGE.read_text(encoding="utf-8"))
    assert found == 1
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
