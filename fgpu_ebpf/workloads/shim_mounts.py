"""Mounts of the gatekeeper's folder in containers, read from /proc/PID/mountinfo. No file of a tenant is opened.

A container has a mount of the folder that existed when the container was made, even if this folder was removed later. A
process that has exited has no mount. The module runs in the agent and in `fgpu detach`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from itertools import islice
from pathlib import Path

from fgpu_ebpf.linux import procfs

FOLDER = "/run/fgpu/shim"
BESIDE = "/var/lib/fgpu/run"  # the folder's second place in a container, whose init may mount over /run
LIST = "/etc/ld.so.preload"
NIX_LIST = "/etc/ld-nix.so.preload"  # the loader of programs built by Nix reads this list in place of LIST
LISTS = (LIST, NIX_LIST)
_REMOVED = "//deleted"  # the kernel's suffix for the source of a mount that was removed


class Mount(Enum):
    """The state of the gatekeeper's folder in a process's mount namespace, at FOLDER or at BESIDE."""

    NONE = auto()
    LIVE = auto()
    REMOVED = auto()
    HIDDEN = auto()  # FOLDER or LIST is mounted for the shim, and another mount covers FOLDER


def mount_of(pid: int) -> Mount:
    """Return the state of the folder that the shim of a process finds.

    If mounts cover each other, the last mount counts.
    """
    own, given = _device_of(Path(FOLDER)), False
    beside, seen, last = Mount.NONE, Mount.NONE, ""
    for device, source, path in _mounts(pid):
        kind = Mount.REMOVED if source.endswith(_REMOVED) else Mount.LIVE
        if path == BESIDE:
            beside = kind
        given = given or path == FOLDER or (path == LIST and device == own)
        if path == FOLDER:
            seen, last = kind, own
        elif FOLDER.startswith(f"{path}/") or (path == "/" and not last):
            seen, last = Mount.NONE, device
    if beside is not Mount.NONE or not given:
        return beside
    return seen if last == own else Mount.HIDDEN


def is_mounted(folder: Path) -> bool:
    """Return whether the folder is mounted in any mount namespace that has a process, even under another mount.

    Another agent's folder can be mounted at the same path. That folder is not counted, because it is on another file
    system.
    """
    own = _device_of(folder)
    return bool(own) and any(
        device == own and path in (str(folder), BESIDE) and not source.endswith(_REMOVED)
        for device, source, path in _mounts_everywhere()
    )


def mounted_lists(run_dir: Path) -> set[str]:
    """Return the paths in LISTS over which fgpu has mounted a list, in the mount namespace of any running process."""
    own = _device_of(run_dir)
    return {
        path
        for device, source, path in _mounts_everywhere()
        if path in LISTS and device == own and source.removesuffix(_REMOVED).endswith(f"/{os.path.basename(path)}")
    }


def one_of_each_namespace(pids: Iterable[int]) -> Iterator[int]:
    """Yield a process of each mount namespace.

    If the yielded process exits before the caller requests the next process, another process of the namespace is
    yielded.
    """
    seen = set[str]()
    for pid in pids:
        namespace = _namespace_of(pid)
        if namespace and namespace not in seen:
            yield pid
            if _namespace_of(pid) == namespace:
                seen.add(namespace)


def _namespace_of(pid: int) -> str:
    """Return a name of the process's mount namespace, or an empty text if the process has exited."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def _mounts_everywhere() -> Iterator[tuple[str, str, str]]:
    """Yield the mounts of all mount namespaces that have a process, in the form of _mounts()."""
    for pid in one_of_each_namespace(procfs.pids()):
        yield from _mounts(pid)


def _mounts(pid: int) -> Iterator[tuple[str, str, str]]:
    """Yield MAJOR:MINOR, source and path of each mount in a process's namespace.

    The result is empty if the process has exited.
    """
    with contextlib.suppress(OSError):
        yield from (mount[:3] for mount in islice(procfs.mounts(pid), procfs.MOST_MOUNTS))


def _device_of(folder: Path) -> str:
    """Return MAJOR:MINOR of the folder's file system, or an empty text if there is no folder."""
    try:
        number = os.stat(folder).st_dev
    except OSError:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"
