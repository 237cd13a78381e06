"""The result of one check of this host, as `fgpu doctor` prints it.

This module runs in the agent and in the commands, in any thread.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO: the inode number of the first pid namespace in every kernel


class Check(NamedTuple):
    """The result of one check. `found`: the present state, as text. `fix`: what to do if `ok` is False."""

    name: str
    ok: bool
    found: str
    fix: str = ""


@cache
def has_host_pids() -> bool:
    """Return whether this process is in the host's first pid namespace, whose pids the BPF programs use.

    The result is cached, because the pid namespace of a process never changes.
    """
    return os.stat("/proc/self/ns/pid").st_ino == FIRST_PID_NAMESPACE
