"""One finding about this host, and what fixes it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO: its inode, always


@dataclass(frozen=True, slots=True)
class Check:
    """`mend` says what to do where `ok` is False; `found` says what was seen."""

    name: str
    ok: bool
    found: str
    mend: str = ""


@cache
def has_host_pids() -> bool:
    """Whether this process names processes as the kernel's programs do: it is in the host's first pid namespace. A
    process never changes its own.
    """
    return os.stat("/proc/self/ns/pid").st_ino == FIRST_PID_NAMESPACE
