"""What a thread rings for a loop to wake: one descriptor, however often.

Owns: the descriptor. Never: blocks, whoever rings and however often. Cannot fail but for want of descriptors: OSError.
"""

from __future__ import annotations

import contextlib
import os


class Bell:
    """Readable from ring() to hush(); any thread and any signal handler may ring."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """For selectors."""
        return self._fd

    def ring(self) -> None:
        """There is something to look at."""
        os.eventfd_write(self._fd, 1)

    def hush(self) -> None:
        """It is looked at now: whoever rings from here on is heard again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
