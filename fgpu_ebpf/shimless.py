"""Why a process that uses a device has no shim, so that somebody can do something about it.

Owns: the reasons, their words, and what was found of each process. Never: believes the process, or opens a file of its
root. On failure: a process that has gone has none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum

from fgpu_ebpf import procfs
from fgpu_ebpf.processes import Process

LIST = "/etc/ld.so.preload"
_MUSL = ("ld-musl", "libc.so")  # its loader is its library, and some distributions call it so


class Reason(StrEnum):
    """As metrics name it; `words` says what it means."""

    STATIC = "static"
    MUSL = "musl"
    NOT_MOUNTED = "not_mounted"
    NOT_LOADED = "not_loaded"
    UNUSED = "unused"

    @property
    def words(self) -> str:
        """What is so, and what can be done."""
        match self:
            case Reason.STATIC:
                return "static programs have no loader that could load it: link them dynamically"
            case Reason.MUSL:
                return f"musl's loader does not read {LIST}: use an image with glibc"
            case Reason.NOT_MOUNTED:
                return f"nothing is mounted at {LIST}: fgpu setup, or --device fgpu.dev/shim=all"
            case Reason.NOT_LOADED:
                return f"what is mounted at {LIST} has not brought it: does it name it, and is that there?"
            case Reason.UNUSED:
                return "they have it and call the driver around it"


def reason(pid: int) -> Reason | None:
    """Of a process that asks for nothing; None: it is gone, or nobody can tell."""
    try:
        loader = procfs.loader(pid)
        if not loader:
            return Reason.STATIC
        if any(os.path.basename(mapped.path).startswith("libfgpu.so") for mapped in procfs.fgpu_mappings(pid) or ()):
            return Reason.UNUSED
        if loader.startswith(_MUSL):
            return Reason.MUSL
        return Reason.NOT_LOADED if procfs.has_mount(pid, LIST) else Reason.NOT_MOUNTED
    except OSError:
        return None


class Reasons:
    """What was found of each process, looked up once: whether it has a shim was settled when its program began.

    By the kernel's entry of it (`generation`), which neither a reused pid nor the next program of a process shares.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Reason] = {}

    def of(self, pid: int, generation: int) -> Reason | None:
        """As `reason`; what nobody could tell is looked up again."""
        found = self._found.get((pid, generation)) or reason(pid)
        if found:
            self._found[pid, generation] = found
        return found

    def forget_ended(self, living: Mapping[int, Process]) -> None:
        """Keep those of these processes alone."""
        lives = {(pid, living[pid].generation) for pid, _ in self._found if pid in living}
        self._found = {life: found for life, found in self._found.items() if life in lives}
