"""Memory cgroups with a limit, by the version of cgroups that has the memory controller on this host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.wait import remove_cgroup

CGROUPS = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A cgroup with a limit of its memory."""

    def __init__(self, parent: Path, name: str) -> None:
        self.folder = parent / name
        self.is_v2 = (parent / "cgroup.controllers").exists()

    def limit(self, size: int) -> None:
        """Set the limit, in bytes. The processes cannot use swap beyond it."""
        (self.folder / ("memory.max" if self.is_v2 else "memory.limit_in_bytes")).write_text(str(size))
        swap, most = ("memory.swap.max", 0) if self.is_v2 else ("memory.memsw.limit_in_bytes", size)
        if (self.folder / swap).exists():
            (self.folder / swap).write_text(str(most))

    def entering(self) -> tuple[str, ...]:
        """Return the words before a command that let it run in the cgroup."""
        return ("sh", "-c", f'echo $$ >{self.folder}/cgroup.procs; exec "$@"', "-")


def controller() -> Path:
    """Return the folder of the root of the memory controller."""
    if (CGROUPS / "cgroup.controllers").exists():
        return CGROUPS
    return CGROUPS / "memory"


@contextmanager
def memory_group(name: str, limit: int) -> Iterator[MemoryGroup]:
    """Make a cgroup below the root, and remove it when its processes have ended."""
    root = controller()
    if (root / "cgroup.controllers").exists():
        (root / "cgroup.subtree_control").write_text("+memory")
    group = MemoryGroup(root, f"{name}-{os.getpid()}")
    group.folder.mkdir()
    try:
        group.limit(limit)
        yield group
    finally:
        remove_cgroup(group.folder)
