"""The bound owner: the cgroup for which the levels, entries, files and connections inside are counted.

If bounds applied to each cgroup, a workload could multiply its bounds by making cgroups inside its own cgroup.
Therefore a bound applies to the outermost cgroup that is one workload. Such a cgroup is a container or pod (by its
name), a job of Slurm, a systemd unit, a cgroup of `fgpu run`, a cgroup of a user other than root, or a cgroup that has
a limit and is not a folder for several workloads. The owner is the outermost such cgroup on the path from the root.
Names further inside do not count, because the workload may choose these names. If the path has no such cgroup, the
owner is the outermost folder with a limit, or else the cgroup itself.

The functions have no state and run in any thread of the agent and the gatekeeper. If a cgroup is gone, only its name is
used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.linux.procfs import DEEPEST
from fgpu_ebpf.workloads import cgroup_names


class Why(StrEnum):
    """The property that makes a cgroup the owner. Refusals show this property."""

    CONTAINER = "container"
    POD = "pod"
    UNIT = "unit"
    JOB = "job of Slurm"
    RUN = "fgpu run"
    USER = "belongs to a user other than root"
    LEVEL = "has a limit of its own"
    ITSELF = "cgroup"


class Owner(NamedTuple):
    """A bound owner: the id of the cgroup (0 if the cgroup is gone), and the path below the hierarchy's root."""

    cgroup: int
    path: str
    why: Why

    def __str__(self) -> str:
        """Return the text that names the owner in a refusal."""
        return f"{self.path} ({self.why})"


def owner_of(root: Path, path: str, is_level: Callable[[int], bool] = lambda _: False) -> Owner:
    """Return the owner of a cgroup's bounds.

    Args:
        root: the mount point of the hierarchy.
        path: the cgroup, relative to the root.
        is_level: a function that returns whether the cgroup with this id has a limit of its own.
    """
    parts = cgroup_names.split(path)[:DEEPEST]
    group: Owner | None = None
    cgroup, at = 0 if parts else _stat(str(root))[0], "/"
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
    """Return the id of a cgroup and the uid of the cgroup's owner.

    The result is (0, 0) if the cgroup does not exist.
    """
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
    if cgroup_names.is_job(above):
        return Why.JOB
    if cgroup_names.is_unit(name):
        return Why.UNIT
    if parts[:-1] == [cgroup_names.RUN_FOLDER]:
        return Why.RUN
    return Why.USER if uid else None
