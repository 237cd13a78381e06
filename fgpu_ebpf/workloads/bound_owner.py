"""The owner of a bound: the cgroup for which the levels, entries, files and connections inside it are counted.

A workload that can make cgroups inside its own would have every bound again in each of them. So a bound belongs to the
outermost cgroup that is one workload: a container or pod by its name, a unit of systemd, a cgroup of `fgpu run`, one
that belongs to a user other than root, or one that a policy gives a limit and that is no folder for workloads. On the
path from the root, the first of these is the owner: the workload itself may name what lies inside it.

The agent and the gatekeeper use this module, in any thread. A cgroup that is gone is judged by its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fgpu_ebpf.linux.procfs import DEEPEST
from fgpu_ebpf.workloads import cgroup_names


class Why(StrEnum):
    """The property that makes a cgroup the owner."""

    CONTAINER = "container"
    POD = "pod"
    UNIT = "unit"
    RUN = "fgpu run"
    USER = "belongs to another user than root"
    LEVEL = "has a limit of its own"
    ITSELF = "cgroup"


@dataclass(frozen=True, slots=True)
class Owner:
    """A cgroup: its id (0 if it is gone) and its path below the hierarchy's root."""

    cgroup: int
    path: str
    why: Why

    def __str__(self) -> str:
        """Return the text that names the owner in a refusal."""
        return f"{self.path} ({self.why})"


def owner_of(root: Path, path: str, is_level: Callable[[int], bool] = lambda _: False) -> Owner:
    """Return the owner of a cgroup's bounds.

    Args:
        root: where the hierarchy is mounted.
        path: the cgroup, relative to the root.
        is_level: returns whether the cgroup with this id has a limit of its own.
    """
    parts = cgroup_names.split(path)[:DEEPEST]
    group: Owner | None = None
    cgroup, at = _stat(str(root))[0], "/"
    for depth, part in enumerate(parts, 1):
        at = "/" + "/".join(parts[:depth])
        cgroup, uid = _stat(f"{root}{at}")
        if why := _why(parts[:depth], uid):
            return Owner(cgroup, at, why)
        if is_level(cgroup):
            group = group or Owner(cgroup, at, Why.LEVEL)
            if not cgroup_names.is_folder(part):
                return Owner(cgroup, at, Why.LEVEL)
    return group or Owner(cgroup, at, Why.ITSELF)


def _stat(folder: str) -> tuple[int, int]:
    """Return the cgroup's id and its user; (0, 0) if it is gone, as if root had made it."""
    try:
        found = os.stat(folder)
    except OSError:
        return 0, 0
    return found.st_ino, found.st_uid


def _why(parts: list[str], uid: int) -> Why | None:
    name, above = parts[-1], parts[-2] if len(parts) > 1 else ""
    if cgroup_names.is_container(name, above):
        return Why.CONTAINER
    if cgroup_names.is_pod(name):
        return Why.POD
    if cgroup_names.is_unit(name):
        return Why.UNIT
    if parts[:-1] == [cgroup_names.RUN_FOLDER]:
        return Why.RUN
    return Why.USER if uid else None
