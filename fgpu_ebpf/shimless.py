"""Why a process that uses a device has no shim, so that somebody can do something about it.

Owns: the reasons, and their words. Never: believes the process, or opens a file of its root. On failure: a process that
has gone has none.
"""

from __future__ import annotations

import os
from enum import StrEnum

from fgpu_ebpf import procfs

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
