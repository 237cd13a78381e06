"""The cgroups of this host: their paths, ids and processes, and the cgroups of `fgpu run`.

The module runs in the agent's main thread and in commands, and never waits for an engine. The removal of a cgroup
during its reading is not an error. A name or path in a user's command that does not exist raises TargetError.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fgpu_ebpf.check import Check
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.workloads.cgroup_names import RUN_FOLDER
from fgpu_ebpf.workloads.workload import Workload, identify

_MOST_PIDS = 1 << 26  # bytes of cgroup.procs: all pids that a host can have
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


class TargetError(Exception):
    """The error of an invalid name, or of a cgroup, process or tenant that does not exist. The text is for the user."""


class Namer(Protocol):
    """An object with the labels that container engines have reported so far."""

    def named(self, workload: Workload) -> Workload:
        """Return the workload with the names and labels that are known now."""

    def missing(self, workload: Workload) -> str:
        """Return why names or labels are not known yet, or an empty text if all are known."""


class Workloads:
    """The cgroup hierarchy mounted at `root`."""

    def __init__(self, root: Path, namer: Namer | None = None) -> None:
        self.root = root
        self._namer = namer

    def walk(self, top: str = "") -> Iterator[str]:
        """Yield the path of every cgroup below `top`, without `top`. A cgroup precedes the cgroups inside it."""
        waiting = [top]
        while waiting:
            inner = [path for _, path in self.inside(waiting.pop())]
            waiting += inner
            yield from inner

    def inside(self, path: str) -> Iterator[tuple[int, str]]:
        """Yield the id and path of every cgroup directly inside the cgroup at `path`.

        A missing cgroup yields nothing.
        """
        with contextlib.suppress(OSError), os.scandir(f"{self.root}{path}") as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield entry.inode(), f"{path}/{entry.name}"

    def identify(self, path: str) -> Workload | None:
        """Return the workload of a cgroup, with labels, or None if the cgroup is gone."""
        workload = identify(self.root, path)
        return self._namer.named(workload) if workload and self._namer else workload

    def missing(self, workload: Workload) -> str:
        """Return why no engine has reported a workload's labels yet.

        The result is empty if an engine has reported the labels, or if no engine can report the labels.
        """
        return self._namer.missing(workload) if self._namer else ""

    def folder(self, path: str) -> str:
        """Return the folder of the cgroup at a path such as `/a/b`. Raise TargetError if the cgroup does not exist."""
        parts = [part for part in path.split("/") if part]
        if ".." in parts or not os.path.isdir(folder := os.path.join(self.root, *parts)):
            raise TargetError(f"no cgroup {path} under {self.root}")
        return folder

    def cgroup(self, path: str) -> int | None:
        """Return the id of the cgroup at this path, or None."""
        try:
            return os.stat(f"{self.root}{path}").st_ino
        except OSError:
            return None

    def is_populated(self, path: str) -> bool:
        """Return whether a process is in the cgroup or in a cgroup below this cgroup."""
        try:
            return b"populated 1" in procfs.read(f"{self.root}{path}/cgroup.events")
        except OSError:
            return path in ("", "/")

    def pids(self, path: str) -> list[int]:
        """Return the pids of the processes in the cgroup itself. The list is empty if the cgroup is gone."""
        try:
            return [int(line) for line in procfs.read(f"{self.root}{path}/cgroup.procs", _MOST_PIDS).split()]
        except OSError:
            return []

    # -- cgroups of `fgpu run`

    def place(self, name: str) -> str:
        """Return the path of the cgroup of `fgpu run` with this name. Raise TargetError if the name is not valid."""
        if not _NAME.fullmatch(name):
            raise TargetError(f"{name!r} is not a valid name: use at most 101 letters, digits, '.', '_' and '-'")
        return f"/{RUN_FOLDER}/{name}"

    def is_own(self, path: str) -> bool:
        """Return whether the cgroup is directly inside the folder of `fgpu run`."""
        return os.path.dirname(path) == f"/{RUN_FOLDER}"

    def own(self) -> list[str]:
        """Return the paths of all cgroups of `fgpu run`, including cgroups of earlier agents."""
        try:
            with os.scandir(f"{self.root}/{RUN_FOLDER}") as entries:
                return [f"/{RUN_FOLDER}/{entry.name}" for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return []

    def make(self, name: str) -> str:
        """Create a cgroup for `fgpu run` and return its path.

        Args:
            name: the name of the cgroup, or empty for the first free `run-N`.

        Raises:
            TargetError: the name is not valid or taken, or the folder of `fgpu run` cannot be created.
        """
        if name:
            self.place(name)
        parent = f"{self.root}/{RUN_FOLDER}"
        try:
            os.makedirs(parent, exist_ok=True)
        except PermissionError as error:  # see make_run_folder()
            raise TargetError(f"{parent} does not exist: restart the agent, which creates this folder") from error
        for number in range(1, 100_000):
            found = name or f"run-{number}"
            try:
                os.mkdir(f"{parent}/{found}")
            except FileExistsError as error:
                if name:
                    raise TargetError(f"a tenant {name!r} already exists") from error
                continue
            return self.place(found)
        raise TargetError("too many tenants of `fgpu run`: no name run-N is free")

    def remove(self, path: str) -> bool:
        """Remove an empty cgroup of `fgpu run`.

        Return False if the kernel refuses because a process is in the cgroup.
        """
        try:
            os.rmdir(self.folder(path))
        except TargetError:
            return True
        except OSError:
            return False
        return True


def is_of_run(path: str) -> bool:
    """Return whether the cgroup at this path was made for `fgpu run`."""
    return os.path.dirname(path) == f"/{RUN_FOLDER}"


def make_run_folder() -> None:
    """Create the folder of `fgpu run`. The agent calls this function before the agent drops capabilities.

    The mode of the hierarchy's root allows no user to write, and root needs CAP_DAC_OVERRIDE. If the hierarchy is
    read-only, the folder is not created, and `fgpu run` fails.
    """
    root = procfs.cgroup2_root()
    if root:
        with contextlib.suppress(OSError):
            (root / RUN_FOLDER).mkdir(exist_ok=True)


def remove_run_folder() -> None:
    """Remove the folder of `fgpu run` if the folder is empty and this process has CAP_DAC_OVERRIDE."""
    root = procfs.cgroup2_root()
    if root:
        with contextlib.suppress(OSError):
            (root / RUN_FOLDER).rmdir()


def checks() -> list[Check]:
    """Return the result of `fgpu doctor` for the cgroup v2 hierarchy."""
    root = procfs.cgroup2_root()
    if root is None:
        fix = "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified"
        return [Check("cgroup v2", False, "only cgroup v1 is mounted", fix)]
    return [Check("cgroup v2", True, str(root))]
