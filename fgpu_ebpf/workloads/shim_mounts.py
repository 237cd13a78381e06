"""Mounts of the gatekeeper's folder in containers, as the kernel lists them: no file of a tenant is opened.

`fgpu detach` and the agent use this module. A mount shows the folder that was there when the container was made, even
if that folder was removed since. A process that has gone has no mount.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from itertools import islice
from pathlib import Path

from fgpu_ebpf.linux import procfs

FOLDER = "/run/fgpu/shim"
BESIDE = "/var/lib/fgpu/run"  # where a container has the folder too, since its init may mount over /run
LIST = "/etc/ld.so.preload"
NIX_LIST = "/etc/ld-nix.so.preload"  # what the loader of programs that Nix built reads instead
LISTS = (LIST, NIX_LIST)
_REMOVED = "//deleted"  # as the kernel marks the source of a mount


class Mount(Enum):
    """The kind of folder that a process sees at FOLDER, or beside the shim."""

    NONE = auto()
    LIVE = auto()
    REMOVED = auto()
    HIDDEN = auto()  # FOLDER was mounted, or the list that preloads the shim is, and the folder is not there


def mount_of(pid: int) -> Mount:
    """Return the kind of folder that the shim of a process finds. Of mounts over each other, the last one counts."""
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
    """Return whether the folder is mounted in any mount namespace that has a process, also if it is hidden there.

    Containers of another agent may have its folder at the same path: that one lies in another file system.
    """
    own = _device_of(folder)
    return bool(own) and any(
        device == own and path in (str(folder), BESIDE) and not source.endswith(_REMOVED)
        for device, source, path in _mounts_everywhere()
    )


def mounted_lists(run_dir: Path) -> set[str]:
    """Return the LISTS over which `fgpu run` has mounted the file of that name, for any process that still runs."""
    own = _device_of(run_dir)
    return {
        path
        for device, source, path in _mounts_everywhere()
        if path in LISTS and device == own and source.removesuffix(_REMOVED).endswith(f"/{os.path.basename(path)}")
    }


def one_of_each_namespace(pids: Iterable[int]) -> Iterator[int]:
    """Yield the first process of each mount namespace."""
    seen = set[str]()
    for pid in pids:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        except OSError:
            continue
        if namespace not in seen:
            seen.add(namespace)
            yield pid


def _mounts_everywhere() -> Iterator[tuple[str, str, str]]:
    """Yield what _mounts() does, for one process of each mount namespace."""
    for pid in one_of_each_namespace(procfs.pids()):
        yield from _mounts(pid)


def _mounts(pid: int) -> Iterator[tuple[str, str, str]]:
    """Yield MAJOR:MINOR, the source and the path of each mount that a process sees."""
    try:
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in islice(file, procfs.MOST_MOUNTS):
                _, _, device, source, path, _ = line.split(" ", 5)
                yield device, source, path
    except OSError:
        return


def _device_of(folder: Path) -> str:
    """Return MAJOR:MINOR of the folder's file system; empty: there is no folder."""
    try:
        number = os.stat(folder).st_dev
    except OSError:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"
