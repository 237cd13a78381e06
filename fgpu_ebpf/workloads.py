"""The cgroups of this host: which there are, who is in them, and those that `fgpu run` is given.

Owns: reading the hierarchy, and the cgroups under /fgpu. Never: decides who is managed, or waits for an engine. On
failure: TargetError for what a caller named and nobody has; a cgroup that went meanwhile is no failure.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fgpu_ebpf import procfs
from fgpu_ebpf.cgroupnames import RUN_FOLDER
from fgpu_ebpf.checks import Check
from fgpu_ebpf.identity import Workload, identify

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


class TargetError(Exception):
    """No such cgroup, process or tenant."""


class Namer(Protocol):
    """Who knows what engines say of workloads, as far as they have said it."""

    def named(self, workload: Workload) -> Workload:
        """The workload with its names and labels."""

    def missing(self, workload: Workload) -> str:
        """Why some are not known; empty: there are no others."""


class Workloads:
    """The hierarchy mounted at `root`."""

    def __init__(self, root: Path, namer: Namer | None = None) -> None:
        self.root = root
        self._namer = namer

    def walk(self) -> Iterator[str]:
        """The path of every cgroup but the root, outer ones first."""
        waiting = [(str(self.root), "")]
        while waiting:
            folder, path = waiting.pop()
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                inner = [
                    (entry.path, f"{path}/{entry.name}") for entry in entries if entry.is_dir(follow_symlinks=False)
                ]
                waiting += inner
                yield from (path for _, path in inner)

    def identify(self, path: str) -> Workload | None:
        """Who the cgroup is; None: it is gone."""
        workload = identify(self.root, path)
        return self._namer.named(workload) if workload and self._namer else workload

    def missing(self, workload: Workload) -> str:
        """Why an engine has not said who this is; empty: it has, or none is to be asked."""
        return self._namer.missing(workload) if self._namer else ""

    def folder(self, path: str) -> str:
        """The folder of a cgroup, which must be there: `/a/b` below the hierarchy's root. TargetError."""
        parts = [part for part in path.split("/") if part]
        if ".." in parts or not os.path.isdir(folder := os.path.join(self.root, *parts)):
            raise TargetError(f"no cgroup {path} under {self.root}")
        return folder

    def cgroup(self, path: str) -> int | None:
        """The id of the cgroup that is there now; None: none is."""
        try:
            return os.stat(f"{self.root}{path}").st_ino
        except OSError:
            return None

    def is_populated(self, path: str) -> bool:
        """Somebody is in it or below it."""
        try:
            return b"populated 1" in procfs.read(f"{self.root}{path}/cgroup.events")
        except OSError:
            return path in ("", "/")

    def pids(self, path: str) -> list[int]:
        """Every process in the cgroup itself."""
        try:
            return [int(line) for line in procfs.read(f"{self.root}{path}/cgroup.procs").split()]
        except OSError:
            return []

    # -- cgroups of `fgpu run`

    def place(self, name: str) -> str:
        """Where the cgroup of a `fgpu run` of that name is. TargetError: it is no name."""
        if not _NAME.fullmatch(name):
            raise TargetError(f"{name!r} is no name: letters, digits, '.', '_' and '-', at most 101")
        return f"/{RUN_FOLDER}/{name}"

    def is_own(self, path: str) -> bool:
        """True for a cgroup directly below the folder of `fgpu run`."""
        return os.path.dirname(path) == f"/{RUN_FOLDER}"

    def own(self) -> list[str]:
        """The paths of all cgroups of `fgpu run`, those of earlier agents included."""
        try:
            with os.scandir(f"{self.root}/{RUN_FOLDER}") as entries:
                return [f"/{RUN_FOLDER}/{entry.name}" for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return []

    def make(self, name: str) -> str:
        """A new cgroup for `fgpu run`; answers its path. TargetError: the name is none, or taken. Empty: any."""
        if name:
            self.place(name)
        parent = f"{self.root}/{RUN_FOLDER}"
        try:
            os.makedirs(parent, exist_ok=True)
        except PermissionError as error:
            raise TargetError(f"{parent} is gone: restart the agent, which makes it when it starts") from error
        for number in range(1, 100_000):
            found = name or f"run-{number}"
            try:
                os.mkdir(f"{parent}/{found}")
            except FileExistsError as error:
                if name:
                    raise TargetError(f"a tenant {name!r} is there already") from error
                continue
            return self.place(found)
        raise TargetError("too many tenants")

    def remove(self, path: str) -> bool:
        """Removes an empty cgroup of `fgpu run`; False: somebody is in it."""
        try:
            os.rmdir(self.folder(path))
        except TargetError:
            return True
        except OSError:
            return False
        return True


def is_of_run(path: str) -> bool:
    """The agent made this cgroup itself, for `fgpu run`."""
    return os.path.dirname(path) == f"/{RUN_FOLDER}"


def make_run_folder() -> None:
    """The folder of `fgpu run`, while we may: nobody may write the hierarchy's root, root overrides that.

    Where the hierarchy is read-only there is no `fgpu run`.
    """
    root = procfs.cgroup2_root()
    if root:
        with contextlib.suppress(OSError):
            (root / RUN_FOLDER).mkdir(exist_ok=True)


def remove_run_folder() -> None:
    """Takes the folder of `fgpu run` away, unless somebody is in it, or we may not: an agent that has started."""
    root = procfs.cgroup2_root()
    if root:
        with contextlib.suppress(OSError):
            (root / RUN_FOLDER).rmdir()


def checks() -> list[Check]:
    """A cgroup v2 hierarchy is mounted."""
    root = procfs.cgroup2_root()
    if root is None:
        mend = "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified"
        return [Check("cgroup v2", False, "only cgroup v1 is mounted", mend)]
    return [Check("cgroup v2", True, str(root))]
