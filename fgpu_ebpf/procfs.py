"""What /proc and the cgroup file system say of a process.

Owns: reading them. Never: believes a process about itself, or fails because one has gone: that is None or empty.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("libcuda.so", "libfgpu.so")


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapped file, as /proc/PID/maps names it."""

    path: str
    dev: int
    ino: int


def fgpu_mappings(pid: int) -> list[Mapping]:
    """The libcuda and shim files that a process has mapped executable, each once."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
            lines = [line for line in file if "libcuda.so" in line or "libfgpu.so" in line]
    except OSError:
        return []
    return list(dict.fromkeys(m for m in map(_mapping, lines) if m))


def _mapping(line: str) -> Mapping | None:
    fields = line.rstrip("\n").split(maxsplit=5)
    if len(fields) < 6 or "x" not in fields[1]:
        return None
    path = fields[5].removesuffix(" (deleted)")
    if not os.path.basename(path).startswith(LIBRARIES):
        return None
    major, minor = (int(part, 16) for part in fields[3].split(":"))
    return Mapping(path, os.makedev(major, minor), int(fields[4]))


def cgroup2_root() -> Path | None:
    """Where the cgroup v2 hierarchy is mounted; None on a host that has none."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            if right.startswith("cgroup2 "):
                return Path(left.split()[4])
    return None


def cgroup_path(pid: int) -> str | None:
    """A process's v2 cgroup, relative to the hierarchy's root, e.g. `/fgpu/run-1`; None: it has gone."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            line = next((line for line in file if line.startswith("0::")), None)
    except OSError:
        return None
    return line[3:].rstrip("\n").removesuffix(" (deleted)") if line else None


def cgroup_ids(root: Path, path: str) -> Iterator[int]:
    """The ids of a cgroup and its ancestors, leaf first, the root last."""
    relative = Path(path.lstrip("/"))
    for level in (relative, *relative.parents):
        try:
            yield (root / level).stat().st_ino
        except OSError:
            continue


def pids() -> list[int]:
    """Every process, threads aside."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
