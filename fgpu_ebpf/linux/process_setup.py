"""Priority and limits that the agent and the gatekeeper set for themselves at their start.

This module runs in the main thread of each process.
"""

from __future__ import annotations

import contextlib
import os
import resource

NICE = -10


def raise_priority() -> None:
    """Raise the priority of this thread and of the threads that this thread starts.

    Without a raised priority, the thread gets a 300th of a processor while 300 programs start. Without CAP_SYS_NICE,
    the priority that the systemd unit has set is kept.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard limit. The usual 1024 is for programs that use select()."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
