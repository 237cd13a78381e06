"""Mounts of the gatekeeper's folder in containers, as the kernel lists them: no file of a tenant is opened.

`fgpu detach` and the agent use this module. A mount shows the folder that was there when the container was made, even
if that folder was removed since. A process that has gone has no mount.
"""

from __future__ import annotations

import os
from enum import Enum, auto
from itertools import islice
from pathlib import Path

from fgpu_ebpf.linux import procfs

FOLDER = Path("/run/fgpu/shim")
_REMOVED = "//deleted"  # as the kernel marks the source of a mount


class Mount(Enum):
    """The kind of folder that a process sees at FOLDER."""

    NONE = auto()
    LIVE = auto()
    REMOVED = auto()


def mount_of(pid: int, folder: Path = FOLDER, device: str = "") -> Mount:
    """Return the kind of the last mount at this path, which hides the others.

    Args:
        pid: the process.
        folder: the path of the mount.
        device: MAJOR:MINOR of the folder's file system; empty: of any.
    """
    found = Mount.NONE
    try:
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in islice(file, procfs.MOST_MOUNTS):
                _, _, its_device, source, path, _ = line.split(" ", 5)
                if path == str(folder) and device in ("", its_device):
                    found = Mount.REMOVED if source.endswith(_REMOVED) else Mount.LIVE
    except OSError:
        return Mount.NONE
    return found


def is_mounted(folder: Path) -> bool:
    """Return whether the folder is mounted in any mount namespace that has a process.

    Containers of another agent may have its folder at the same path: that one lies in another file system.
    """
    try:
        number = os.stat(folder).st_dev
    except OSError:
        return False
    device, seen = f"{os.major(number)}:{os.minor(number)}", set[str]()
    for pid in procfs.pids():
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        except OSError:
            continue
        if namespace not in seen and mount_of(pid, folder, device) is Mount.LIVE:
            return True
        seen.add(namespace)
    return False
