"""The reason why a process that uses a device has no shim, or does not use it, and what can be done about it.

The agent's main thread uses this module. Facts come from the kernel: the process is not believed, and no file in its
root is opened. A process that has gone has no reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Set
from enum import StrEnum

from fgpu_ebpf.driver import cuda_mappings
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.workloads import shim_mounts
from fgpu_ebpf.workloads.shim_mounts import Mount

LIST = shim_mounts.LIST
_MUSL = ("ld-musl", "libc.so")  # musl's loader is its library, and some distributions call it libc.so

IsShim = Callable[[int, int], bool]


class Reason(StrEnum):
    """A reason why a process does not use the shim. Its value is its name in metrics; `words` explains it."""

    STATIC = "static"
    MUSL = "musl"
    NOT_MOUNTED = "not_mounted"
    NOT_LOADED = "not_loaded"
    FOREIGN = "foreign"
    HIDDEN = "hidden"
    STALE_MOUNT = "stale_mount"
    RUN_HIDDEN = "run_hidden"
    UNUSED = "unused"

    @property
    def words(self) -> str:
        """The meaning of the reason, and what can be done."""
        match self:
            case Reason.STATIC:
                return "static programs have no loader, so they cannot load the shim: link them dynamically"
            case Reason.MUSL:
                return f"musl's loader does not read {LIST}: use an image with glibc"
            case Reason.NOT_MOUNTED:
                return f"nothing is mounted at {LIST}: fgpu setup, or --device fgpu.dev/shim=all"
            case Reason.NOT_LOADED:
                return f"the list that is mounted at {LIST} did not load the shim: does it name a shim that exists?"
            case Reason.FOREIGN:
                return "this host has not published their libfgpu.so: mount the host's, or build the image again"
            case Reason.HIDDEN:
                return (
                    "the shim is loaded, but they execute memory that no file backs, in which a copy of libcuda cannot "
                    "be probed"
                )
            case Reason.STALE_MOUNT:
                return "/run/fgpu/shim was removed while their container ran: restart the container"
            case Reason.RUN_HIDDEN:
                return (
                    f"a mount hides {shim_mounts.FOLDER} from them: create the container again, so that it has the "
                    f"folder at {shim_mounts.BESIDE} too"
                )
            case Reason.UNUSED:
                return "the shim is loaded, but they call the driver without it"


_OF_MOUNT = {Mount.REMOVED: Reason.STALE_MOUNT, Mount.HIDDEN: Reason.RUN_HIDDEN}  # of a process that has the shim


def reason(pid: int, is_shim: IsShim = lambda *_: True) -> Reason | None:
    """Return the reason of a process; None: it is gone or unreadable. `is_shim`: is a (dev, ino) a published shim?"""
    try:
        loader = procfs.loader(pid)
        if not loader:
            return Reason.STATIC
        mapped = cuda_mappings.fgpu_mappings(pid) or ()
        named = [one for one in mapped if os.path.basename(one.path).startswith("libfgpu.so")]
        if named and not any(is_shim(one.dev, one.ino) for one in named):
            return Reason.FOREIGN
        if named:
            return _OF_MOUNT.get(shim_mounts.mount_of(pid), Reason.UNUSED)
        if loader.startswith(_MUSL):
            return Reason.MUSL
        return Reason.NOT_LOADED if procfs.has_mount(pid, LIST) else Reason.NOT_MOUNTED
    except OSError:
        return None


class Reasons:
    """The reasons of all processes. Each is looked up once: a program loads the shim at its start or never.

    The key has the generation of the kernel's entry: neither a reused pid nor the next program of a process has the
    same. `is_shim` is as for reason(); `hidden` returns the processes that execute memory of no file.
    """

    def __init__(self, is_shim: IsShim = lambda *_: True, hidden: Callable[[], Set[int]] = frozenset) -> None:
        self._is_shim, self._hidden = is_shim, hidden
        self._found: dict[tuple[int, int], Reason] = {}

    def of(self, pid: int, generation: int) -> Reason | None:
        """Return the reason of a process, looked up again if there was none."""
        found = self._found.get((pid, generation)) or reason(pid, self._is_shim)
        if found:
            self._found[pid, generation] = found
        return Reason.HIDDEN if found is Reason.UNUSED and pid in self._hidden() else found

    def forget_ended(self, living: Mapping[int, Process]) -> None:
        """Forget all processes but these."""
        lives = {(pid, living[pid].generation) for pid, _ in self._found if pid in living}
        self._found = {life: found for life, found in self._found.items() if life in lives}
