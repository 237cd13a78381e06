"""eventfd(2): a thread wakes the loop of another thread.

This module runs in any thread of the agent, the gatekeeper and the commands, and never blocks. Wakeup() raises OSError
if the process has no descriptor left.
"""

from __future__ import annotations

import contextlib
import os


class Wakeup:
    """A descriptor that is readable from wake() to clear(); any thread and any signal handler may call wake()."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor. No thread may call another method afterwards."""
        os.close(self._fd)

    def wake(self) -> None:
        """Make the descriptor readable. Several calls before clear() have the effect of one call."""
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Make the descriptor unreadable. The caller then checks for work, so that no later wake() is lost."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
