"""Mounts of the gatekeeper's folder in containers, as the kernel lists them: no file of a tenant is opened.

Used by `fgpu detach` and by the agent. A mount shows the folder that was there when the container was made,
also where that was removed since. On failure: a process that has gone has no mount.
"""

from __future__ import annotations

import os
from enum import Enum, auto
from itertools import islice
from pathlib import Path

from fgpu_ebpf import procfs

FOLDER = Path("/run/fgpu/shim")
_REMOVED = "//deleted"  # as the kernel marks the source of a mount


class Mount(Enum):
    """What a process sees at FOLDER."""

    NONE = auto()
    LIVE = auto()
    REMOVED = auto()


def mount_of(pid: int, folder: Path = FOLDER) -> Mount:
    """Of the mounts at that place the last, which hides the others."""
    found = Mount.NONE
    try:
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in islice(file, procfs.MOST_MOUNTS):
                _, _, _, source, place, _ = line.split(" ", 5)
                if place == str(folder):
                    found = Mount.REMOVED if source.endswith(_REMOVED) else Mount.LIVE
    except OSError:
        return Mount.NONE
    return found


def is_mounted(folder: Path) -> bool:
    """In any mount namespace that has a process."""
    seen: set[str] = set()
    for pid in procfs.pids():
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        except OSError:
            continue
        if namespace not in seen and mount_of(pid, folder) is Mount.LIVE:
            return True
        seen.add(namespace)
    return False
