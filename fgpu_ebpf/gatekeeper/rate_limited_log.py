"""The gatekeeper's log: at most MOST_LINES a second, without blocking.

Runs in the gatekeeper's main thread. The maximum keeps tenants from filling the log. A line that cannot be written at
once is lost.
"""

from __future__ import annotations

import contextlib
import os
import select

MOST_LINES = 10


class LogLines:
    """Lines on standard error, at most MOST_LINES between two calls of renew()."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines = 0

    def say(self, line: str) -> None:
        """Write a line. After MOST_LINES lines, only count it as omitted."""
        self._lines += 1
        with contextlib.suppress(OSError, ValueError):  # logging must not wait for the reader of a pipe
            if self._lines <= MOST_LINES and select.select([], [2], [], 0)[1]:
                os.write(2, f"{self._name}: {line}\n".encode())

    def renew(self) -> None:
        """Report how many lines were omitted, and allow MOST_LINES again. To be called once a second."""
        more, self._lines = self._lines - MOST_LINES, 0
        if more > 0:
            self.say(f"{more} more lines omitted")
        self._lines = 0
