"""docs/faults.md has a row for each fault that the tests of combinations cause, with the cells of these tests."""

from __future__ import annotations

from tests.e2e.faults_page import PAGE, TABLE, table


def test_the_table_is_that_of_the_tests() -> None:
    assert TABLE.findall(PAGE.read_text(encoding="utf-8")) == [table()], "run python -m tests.e2e.faults_page"
