"""What people are told of memory that outlives its process: one sentence for each orphan. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fgpu_ebpf.quantities import memory_text

SHOWN_SECONDS = 1.0  # the driver takes up to a tenth of a second to let go, more where many processes end at once


def lasting(orphans: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of a Snapshot's orphans that are older than it takes to end a process."""
    return [orphan for orphan in orphans if orphan["seconds"] > SHOWN_SECONDS]


def keepers(orphan: Mapping[str, Any]) -> str:
    """Which processes keep the memory, or why none is named."""
    if orphan["keepers"]:
        return "kept by pid " + ", ".join(map(str, orphan["keepers"]))
    return "kept by a descriptor that no process of its cgroups has"


def sentence(orphan: Mapping[str, Any]) -> str:
    """What is held, of which process, and what to do about it."""
    what = f"{memory_text(orphan['bytes'])} on gpu {orphan['gpu']}"
    why = "which has ended" if orphan["ended"] else "which exported and freed them"
    found = f"{what} stay charged for process {orphan['pid']}, {why}: {keepers(orphan)}"
    if not orphan["keepers"]:
        return f"{found}; it may lie unread in a socket, or another container has it"
    which = "it" if len(orphan["keepers"]) == 1 else "them"
    return f"{found}; end {which}, or have the descriptors of the driver closed"
