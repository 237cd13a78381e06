"""Who is waited for comes first on the processor: agent and gatekeeper, while hundreds of programs start.

Owns nothing. On failure (no CAP_SYS_NICE, and no unit that has seen to it): the processor is shared as with any other.
"""

from __future__ import annotations

import contextlib
import os

NICE = -10


def come_first() -> None:
    """This thread, and those that it starts: among 300 programs that start, its share would be a 300th."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
