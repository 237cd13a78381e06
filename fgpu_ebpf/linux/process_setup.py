"""Resources that the agent and the gatekeeper take for themselves at their start.

The main threads of both use this module.
"""

from __future__ import annotations

import contextlib
import os
import resource

NICE = -10


def raise_priority() -> None:
    """Raise the priority of this thread and of those that it starts.

    Without that, a 300th of the processor is left for it while 300 programs start. Without CAP_SYS_NICE the priority
    stays as it is, which is what the unit has set.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one: the usual 1024 is meant for programs that use select()."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
