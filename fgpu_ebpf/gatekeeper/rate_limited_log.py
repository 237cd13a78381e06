"""The gatekeeper's log: at most MOST_LINES a second, without blocking.

This module runs in the gatekeeper's main thread. The maximum keeps tenants from filling the log. A line that cannot be
written at once is lost. As in the agent's log, a line begins with the local time, except in systemd's journal, which
has the time of each entry.
"""

from __future__ import annotations

import contextlib
import os
import select
import time

from fgpu_ebpf.linux import printable

MOST_LINES = 10


class LogLines:
    """Lines on standard error, at most MOST_LINES between two calls of renew()."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_journal = _is_journal()
        self._lines = 0

    def say(self, line: str) -> None:
        """Write a line. Lines beyond MOST_LINES are only counted as omitted."""
        self._lines += 1
        with contextlib.suppress(OSError, ValueError):  # logging must not wait for the reader of a pipe
            if self._lines <= MOST_LINES and select.select([], [2], [], 0)[1]:
                when = "" if self._is_journal else time.strftime("%F %T ")
                os.write(2, f"{when}{self._name}: {printable.line(line)}\n".encode())

    def renew(self) -> None:
        """Report how many lines were omitted, and allow MOST_LINES again.

        The caller calls this method once a second.
        """
        more, self._lines = self._lines - MOST_LINES, 0
        if more > 0:
            self.say(f"{more} more lines omitted")
        self._lines = 0


def _is_journal() -> bool:
    """Return whether a service manager has connected standard error to the journal."""
    with contextlib.suppress(OSError):
        there = os.fstat(2)
        return os.environ.get("JOURNAL_STREAM", "") == f"{there.st_dev}:{there.st_ino}"
    return False
