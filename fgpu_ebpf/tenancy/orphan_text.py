"""The text about orphans, one sentence for each. The functions do no I/O, and run in the agent and in commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fgpu_ebpf.policy.units import memory_text

SHOWN_SECONDS = 1.0  # the driver needs 0.1 s to free the memory of an exited process, or longer if many exit at once


def lasting(orphans: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the orphans of a Snapshot that are older than the driver needs to free the memory of an exited process."""
    return [orphan for orphan in orphans if orphan["seconds"] > SHOWN_SECONDS]


def keepers(orphan: Mapping[str, Any]) -> str:
    """Return a text with the processes that keep the memory, or a text that no such process was found."""
    if orphan["keepers"]:
        return "kept by pid " + ", ".join(map(str, orphan["keepers"]))
    return "no process with a descriptor of the driver was found"


def sentence(orphan: Mapping[str, Any]) -> str:
    """Return a sentence with the held bytes, their former process, the processes that keep the bytes, and the fix."""
    what = f"{memory_text(orphan['bytes'])} on gpu {orphan['gpu']}"
    why = "which has ended" if orphan["ended"] else "which exported and freed these bytes"
    found = f"{what} stay charged for process {orphan['pid']}, {why}: {keepers(orphan)}"
    if not orphan["keepers"]:
        return f"{found}; a descriptor may be unread in a socket"
    return f"{found}; end {_which(orphan)}, or make the program close the driver's descriptors"


def _which(orphan: Mapping[str, Any]) -> str:
    """Return `pid 4711, a child of 4700` if parents are known, because a parent may start the process again."""
    kept, parents = orphan["keepers"], orphan.get("parents", ())
    if not any(parents):
        return "this process" if len(kept) == 1 else "these processes"
    known = zip(kept, parents, strict=True)
    return " and ".join(f"pid {pid}, a child of {parent}" if parent else f"pid {pid}" for pid, parent in known)
