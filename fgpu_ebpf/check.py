"""A finding of `fgpu doctor` about this host, with its fix.

The packages that make findings use this module, and so do the commands that show them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO: its inode, always


@dataclass(frozen=True, slots=True)
class Check:
    """A finding. `found`: what was seen; `fix`: what to do if `ok` is False."""

    name: str
    ok: bool
    found: str
    fix: str = ""


@cache
def has_host_pids() -> bool:
    """Return whether this process is in the host's first pid namespace, and so has the same pids as the BPF programs.

    The namespace of a process never changes.
    """
    return os.stat("/proc/self/ns/pid").st_ino == FIRST_PID_NAMESPACE
