"""The gatekeeper's log: some lines a second, which nothing waits for.

Owns: how many lines were written since the last `renew`, and how many left out. Never: blocks, raises, or lets tenants
make a log grow without bound. Cannot fail: a line that cannot be written at once is lost.
"""

from __future__ import annotations

import contextlib
import os
import select

MOST_LINES = 10


class LogLines:
    """Lines on standard error, at most MOST_LINES between two calls of `renew`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines = 0

    def say(self, line: str) -> None:
        """Writes it, or counts it as left out."""
        self._lines += 1
        with contextlib.suppress(OSError, ValueError):  # a log that nothing reads must not be waited for
            if self._lines <= MOST_LINES and select.select([], [2], [], 0)[1]:
                os.write(2, f"{self._name}: {line}\n".encode())

    def renew(self) -> None:
        """To be called once a second: tells how many lines were left out."""
        more, self._lines = self._lines - MOST_LINES, 0
        if more > 0:
            self.say(f"{more} more lines left out")
        self._lines = 0
