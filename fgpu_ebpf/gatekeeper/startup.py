"""Set-up of the gatekeeper's process before it serves: its lock, its limits, its priority.

Runs once, in the main thread. On OSError the process ends with one line.
"""

from __future__ import annotations

import _thread
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fgpu_ebpf.ledger.ledger import Ledger, LedgerMissing
from fgpu_ebpf.linux import capabilities, file_locks, malloc, procfs
from fgpu_ebpf.linux.file_locks import FileLock
from fgpu_ebpf.linux.process_setup import raise_descriptor_limit, raise_priority

LOCK_SECONDS = 0.1


def open_ledger(pins: Path, factory: Callable[[Path], Ledger]) -> Ledger | None:
    """Return the ledger, or None while the loader has not pinned all of it."""
    try:
        return factory(pins)
    except LedgerMissing:
        return None


def _wait_for(lock: FileLock) -> None:
    """Take the lock as soon as its holder releases it; an agent's own gatekeeper does so at once. Raises OSError."""
    waiting = FileLock(lock.path.parent / file_locks.NEXT)
    is_next = False  # if several wait, one of them holds the second lock for all
    while not lock.take():
        is_next = is_next or waiting.take()
        time.sleep(LOCK_SECONDS)
    waiting.release()


def prepare(lock: FileLock, is_patient: bool) -> Path:
    """Take the lock, and do everything that may fail. Returns the root of the cgroups.

    Args:
        is_patient: wait while another gatekeeper has the lock, so that this one is there when that one ends.

    Raises:
        OSError: no cgroup2 is mounted, or another gatekeeper has the lock.
    """
    root = procfs.cgroup2_root()
    if root is None:
        raise OSError("no cgroup2 is mounted: boot with systemd.unified_cgroup_hierarchy=1")
    os.umask(0o022)
    if is_patient:
        _wait_for(lock)
    elif not lock.take():
        raise OSError(f"another gatekeeper holds {lock.path}")
    raise_descriptor_limit()
    raise_priority()
    capabilities.keep_only(capabilities.GATEKEEPER)
    malloc.keep_small()
    sys.setswitchinterval(0.0005)
    _thread.stack_size(256 * 1024)
    return root
