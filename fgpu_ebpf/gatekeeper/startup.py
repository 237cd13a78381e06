"""Set-up of the gatekeeper process before service: its lock, resource limits, capabilities and priority.

This module runs once, in the main thread. After an OSError the process prints one line and exits.
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
    """Return the ledger, or None while the loader has not pinned all maps of the ledger."""
    try:
        return factory(pins)
    except LedgerMissing:
        return None


def _wait_for(lock: FileLock) -> None:
    """Take the lock as soon as the holder releases the lock. Raise OSError on failure.

    A gatekeeper that an agent has started (--stand-in) exits as soon as another gatekeeper waits.
    """
    waiting = FileLock(lock.path.parent / file_locks.NEXT)
    is_next = False  # if several gatekeepers wait, one gatekeeper holds the second lock
    while not lock.take():
        is_next = is_next or waiting.take()
        time.sleep(LOCK_SECONDS)
    waiting.release()


def prepare(lock: FileLock, is_patient: bool) -> Path:
    """Take the lock and set up the process. Return the mount point of the cgroup v2 hierarchy.

    Args:
        lock: the lock of the gatekeeper.
        is_patient: wait while another gatekeeper has the lock, and replace that gatekeeper at its exit.

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
        raise OSError(f"another gatekeeper runs and holds the lock {lock.path}")
    raise_descriptor_limit()
    raise_priority()
    capabilities.keep_only(capabilities.GATEKEEPER)
    malloc.keep_small()
    sys.setswitchinterval(0.0005)
    _thread.stack_size(256 * 1024)
    return root
