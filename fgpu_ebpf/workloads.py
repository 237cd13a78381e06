"""Cgroups with names: which of them are managed, and under which name.

Owns: the list of managed cgroups and its file, which outlives the agent but not a reboot. Never: writes a limit (the
ledger does) or reads an engine. On failure: TargetError for what a caller named and nobody has.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.checks import Check

RUN_FOLDER = "fgpu"
NAME_CHARACTERS = 128
ENTER_SECONDS = 10.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


class TargetError(Exception):
    """No such cgroup, process or tenant."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A managed cgroup. `memory_bytes` is its limit on each device; `ephemeral`: the agent made the cgroup itself."""

    cgroup: int
    path: str
    name: str
    memory_bytes: int
    ephemeral: bool


class Workloads:
    """The managed cgroups of this host."""

    def __init__(self, root: Path, state: Path) -> None:
        self.root = root
        self._state = state
        self._all = {w.cgroup: w for w in self._read()}
        self._awaited: dict[int, float] = {}  # own cgroups that nobody has entered yet: until when

    def __iter__(self) -> Iterator[Workload]:
        return iter(list(self._all.values()))

    def _read(self) -> Iterable[Workload]:
        try:
            found = json.loads(self._state.read_text(encoding="utf-8"))
            return [Workload(**entry) for entry in found]
        except (OSError, ValueError, TypeError, RecursionError):
            return []

    def _write(self) -> None:
        beside = self._state.with_suffix(".new")
        beside.write_text(json.dumps([asdict(w) for w in self]), encoding="utf-8")
        os.replace(beside, self._state)

    def folder(self, path: str) -> Path:
        """The folder of a cgroup, which must be there: `/a/b` below the hierarchy's root."""
        parts = [part for part in path.split("/") if part]
        if ".." in parts or not (folder := self.root.joinpath(*parts)).is_dir():
            raise TargetError(f"no cgroup {path} under {self.root}")
        return folder

    def find(self, target: str) -> str:
        """TARGET -> cgroup path: `/cgroup/path`, `pid/N`, or a tenant's name."""
        if target.startswith("/"):
            self.folder(target)
            return "/" + "/".join(part for part in target.split("/") if part)
        if target.startswith("pid/") and target[4:].isdigit():
            path = procfs.cgroup_path(int(target[4:]))
            if path is None:
                raise TargetError(f"no process {target[4:]}")
            return path
        for workload in self:
            if workload.name == target:
                return workload.path
        raise TargetError(f"no tenant {target!r}: name one of `fgpu status`, a /cgroup/path or pid/N")

    def put(self, path: str, memory_bytes: int, name: str = "", ephemeral: bool = False) -> Workload:
        """Enters a cgroup, or changes its limit."""
        cgroup = self.folder(path).stat().st_ino
        before = self._all.get(cgroup)
        name = before.name if before else self._unique(name or os.path.basename(path) or "root", cgroup)
        workload = Workload(cgroup, path, name, memory_bytes, before.ephemeral if before else ephemeral)
        self._all[cgroup] = workload
        if ephemeral:
            self._awaited[cgroup] = time.monotonic() + ENTER_SECONDS
        self._write()
        return workload

    def _unique(self, name: str, cgroup: int) -> str:
        name = name[:NAME_CHARACTERS]
        if any(w.name == name for w in self):
            return f"{name[: NAME_CHARACTERS - 21]}-{cgroup}"
        return name

    def drop(self, cgroup: int) -> None:
        """Forgets a cgroup."""
        self._awaited.pop(cgroup, None)
        if self._all.pop(cgroup, None):
            self._write()

    def is_group(self, workload: Workload) -> bool:
        """Another managed cgroup lies below it."""
        prefix = workload.path.rstrip("/") + "/"
        return any(w.path.startswith(prefix) for w in self if w is not workload)

    def is_gone(self, workload: Workload) -> bool:
        """The cgroup is no longer there, or another one bears its path. An own cgroup that is empty is removed."""
        folder = self.root / workload.path.lstrip("/")
        with contextlib.suppress(OSError):
            if workload.ephemeral and self._is_left(workload, folder):
                folder.rmdir()
        try:
            return folder.stat().st_ino != workload.cgroup
        except OSError:
            return True

    def _is_empty_and_ours(self, folder: Path) -> bool:
        """A `fgpu run` of that name has ended, and nobody has come to remove its cgroup yet."""
        ours = any(w.ephemeral and self.root / w.path.lstrip("/") == folder for w in self)
        with contextlib.suppress(OSError):
            return ours and "populated 0" in (folder / "cgroup.events").read_text()
        return False

    def _is_left(self, workload: Workload, folder: Path) -> bool:
        """Nobody is in it, and nobody is about to enter."""
        empty = "populated 0" in (folder / "cgroup.events").read_text()
        if not empty:
            self._awaited.pop(workload.cgroup, None)
        return empty and time.monotonic() > self._awaited.get(workload.cgroup, 0.0)

    def make(self, name: str) -> str:
        """A new cgroup for `fgpu run`; answers its path."""
        if name and not _NAME.fullmatch(name):
            raise TargetError(f"{name!r} is no name: letters, digits, '.', '_' and '-', at most 101")
        parent = self.root / RUN_FOLDER
        parent.mkdir(exist_ok=True)
        for number in range(1, 100_000):
            folder = parent / (name or f"run-{number}")
            try:
                folder.mkdir()
            except FileExistsError as error:
                if name and not self._is_empty_and_ours(folder):
                    raise TargetError(f"a tenant {name!r} is there already") from error
                if not name:
                    continue
            return f"/{RUN_FOLDER}/{folder.name}"
        raise TargetError("too many tenants")

    def levels(self, path: str) -> tuple[int, ...]:
        """The managed cgroups of a path, leaf first, as the kernel would find them."""
        found = [c for c in procfs.cgroup_ids(self.root, path) if c in self._all]
        return tuple(found[: pages.LEVELS])

    def pids(self, workload: Workload) -> list[int]:
        """Every process in the cgroup and below it."""
        found: list[int] = []
        for folder, _, _ in os.walk(self.root / workload.path.lstrip("/")):
            with contextlib.suppress(OSError):
                found += [int(line) for line in Path(folder, "cgroup.procs").read_text().split()]
        return found


def checks() -> list[Check]:
    """A cgroup v2 hierarchy is mounted."""
    root = procfs.cgroup2_root()
    if root is None:
        mend = "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified"
        return [Check("cgroup v2", False, "only cgroup v1 is mounted", mend)]
    return [Check("cgroup v2", True, str(root))]
