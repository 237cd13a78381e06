"""What the gatekeeper's process takes before its first promise: its lock, its limits, its place at the processor.

Owns: nothing. On failure: OSError, and the process ends with one line.
"""

from __future__ import annotations

import _thread
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fgpu_ebpf import heap, locks, privileges, procfs
from fgpu_ebpf.ledger import Ledger, LedgerMissing
from fgpu_ebpf.locks import FileLock
from fgpu_ebpf.urgency import come_first

LOCK_SECONDS = 0.1


def open_ledger(pins: Path, factory: Callable[[Path], Ledger]) -> Ledger | None:
    """The ledger, or None while the loader has not pinned all of it."""
    try:
        return factory(pins)
    except LedgerMissing:
        return None


def _wait_for(lock: FileLock) -> None:
    """Take the lock as soon as its holder lets go, which a stand-in of the agent does at once. Raises OSError."""
    waiting = FileLock(lock.path.parent / locks.NEXT)
    is_next = False  # one of those that wait says so for all
    while not lock.take():
        is_next = is_next or waiting.take()
        time.sleep(LOCK_SECONDS)
    waiting.release()


def prepare(lock: FileLock, is_patient: bool) -> Path:
    """Take the lock and make what may fail, before the first promise. Returns the root of the cgroups.

    `is_patient`: wait while another gatekeeper has the lock, so that the next one is there when that one ends. Raises
    OSError.
    """
    root = procfs.cgroup2_root()
    if root is None:
        raise OSError("no cgroup2 is mounted: boot with systemd.unified_cgroup_hierarchy=1")
    os.umask(0o022)
    if is_patient:
        _wait_for(lock)
    elif not lock.take():
        raise OSError(f"another gatekeeper holds {lock.path}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    come_first()
    privileges.keep_only(privileges.GATEKEEPER)
    heap.keep_small()
    sys.setswitchinterval(0.0005)
    _thread.stack_size(256 * 1024)
    return root
