"""The reason why a process that uses a device has no shim or does not use its shim, and the fix.

Workers search for reasons, because a read of a process's mappings can block on the process. The agent's main thread
asks Reasons, which never waits. Facts come from the kernel: no information from the process itself is used, and no file
in its root is opened. A process that has exited has no reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Set
from enum import StrEnum
from functools import partial

from fgpu_ebpf.driver import cuda_mappings
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.workloads import shim_mounts
from fgpu_ebpf.workloads.shim_mounts import Mount

LIST, NIX_LIST = shim_mounts.LISTS
_MUSL = ("ld-musl", "libc.so")  # musl's loader is its C library, which some distributions call libc.so
_USUAL = re.compile(r"(/usr)?/lib(64|/x86_64-linux-gnu)?/ld[^/]*")  # glibc's loader in a distribution
_OF_NIX = "/nix/store/"
_MOST_OF_A_PATH = 160  # characters; names in Nix's store have up to 211, but the beginning identifies a package

IsShim = Callable[[int, int], bool]


class Reason(StrEnum):
    """A reason why a process does not use the shim. The value is the reason's name in metrics.

    `words`: the meaning of the reason, and the fix.
    """

    words: str

    def __new__(cls, value: str, words: str) -> Reason:
        self = str.__new__(cls, value)
        self._value_, self.words = value, words
        return self

    STATIC = "static", "static programs have no loader, so they cannot load the shim: link them dynamically"
    BITS_32 = "32_bit", "the shim is for 64-bit programs: use a 64-bit build"
    MUSL = "musl", f"musl's loader does not read {LIST}: use an image with glibc"
    NOT_MOUNTED = (
        "not_mounted",
        f"nothing is mounted at {LIST} (programs that Nix built: {NIX_LIST}): "
        "run fgpu setup, or start the container with --device fgpu.dev/shim=all, or, if the program is in no "
        "container, start it by fgpu run",
    )
    NOT_LOADED = (
        "not_loaded",
        f"the loader did not load the shim from the list that is mounted at {LIST} (programs that Nix built: "
        f"{NIX_LIST}): check that the list names an existing shim",
    )
    OTHER_LOADER = (
        "other_loader",
        f"the program's loader did not load the shim from the list that is mounted at {LIST}, and is not a "
        "distribution's loader: "
        f"Nix's loader reads {NIX_LIST} (create the container again), and other loaders may need LD_PRELOAD with the "
        "shim's path",
    )
    FOREIGN = (
        "foreign",
        "this host has not published the loaded libfgpu.so: mount the host's libfgpu.so, or build the image again",
    )
    HIDDEN = (
        "hidden",
        "the shim is loaded, but the program executes memory that no file backs: such memory cannot be probed",
    )
    STALE_MOUNT = (
        "stale_mount",
        "/run/fgpu/shim was removed while the container ran: restart the container",
    )
    RUN_HIDDEN = (
        "run_hidden",
        f"a mount in the container hides {shim_mounts.FOLDER}: create the container again, so that the container "
        f"has the folder at {shim_mounts.BESIDE} too",
    )
    UNUSED = "unused", "the shim is loaded, but the program calls the driver without the shim"


Then = Callable[[Reason | None, str], None]  # takes the result of search()
_OF_MOUNT = {Mount.REMOVED: Reason.STALE_MOUNT, Mount.HIDDEN: Reason.RUN_HIDDEN}  # for processes that have the shim


def reason(pid: int, is_shim: IsShim = lambda *_: True) -> Reason | None:
    """Return the reason why a process does not use the shim; None: the process has exited, or is unreadable.

    Args:
        pid: the process.
        is_shim: returns whether the file with a (dev, ino) is a published shim.
    """
    try:
        if procfs.is_32_bit(pid):
            return Reason.BITS_32
        loader = procfs.loader(pid)
        if not loader:
            return Reason.STATIC
        mapped = cuda_mappings.fgpu_mappings(pid) or ()
        named = [one for one in mapped if os.path.basename(one.path).startswith("libfgpu.so")]
        if named and not any(is_shim(one.dev, one.ino) for one in named):
            return Reason.FOREIGN
        if named:
            return _OF_MOUNT.get(shim_mounts.mount_of(pid), Reason.UNUSED)
        if os.path.basename(loader).startswith(_MUSL):
            return Reason.MUSL
        of_nix = loader.startswith(_OF_NIX)
        if procfs.has_mount(pid, NIX_LIST if of_nix else LIST):
            return Reason.NOT_LOADED if of_nix or _USUAL.fullmatch(loader) else Reason.OTHER_LOADER
        return Reason.OTHER_LOADER if of_nix and procfs.has_mount(pid, LIST) else Reason.NOT_MOUNTED
    except OSError:
        return None


def loader_of(pid: int) -> str:
    """Return the path of a process's loader, or an empty text. The path, which the process may choose, is quoted."""
    try:
        path = procfs.loader(pid)
    except OSError:
        return ""
    return ascii(path if len(path) <= _MOST_OF_A_PATH else f"{path[:_MOST_OF_A_PATH]}...") if path else ""


def search(pid: int, is_shim: IsShim = lambda *_: True) -> tuple[Reason | None, str]:
    """Return reason(), and loader_of() if the loader is the reason. Only workers may call this function."""
    found = reason(pid, is_shim)
    return found, loader_of(pid) if found is Reason.OTHER_LOADER else ""


class Reasons:
    """The reasons of all processes. A reason is looked up once, because a program loads the shim at its start or never.

    The key contains the generation of the kernel's entry, so a reused pid and the next program of a process have other
    keys.

    Args:
        explain: lets a worker do search() for a process. The main thread passes the result on. The return value is
            False if the job was not queued.
        hidden: returns the processes that execute memory that no file backs.
    """

    def __init__(
        self, explain: Callable[[int, Then], bool] = lambda *_: False, hidden: Callable[[], Set[int]] = frozenset
    ) -> None:
        self._explain, self._hidden = explain, hidden
        self._found: dict[tuple[int, int], tuple[Reason, str]] = {}
        self._searched: set[tuple[int, int]] = set()  # the keys for which a worker searches now

    def of(self, pid: int, generation: int) -> Reason | None:
        """Return why a process does not use the shim; None: not known yet. A search is queued for an unknown reason."""
        key = pid, generation
        if key not in self._found and key not in self._searched:
            self._searched.add(key)
            if not self._explain(pid, partial(self._take, key)):
                self._searched.discard(key)
        known, _ = self._found.get(key, (None, ""))
        return Reason.HIDDEN if known is Reason.UNUSED and pid in self._hidden() else known

    def _take(self, key: tuple[int, int], found: Reason | None, loader: str) -> None:
        self._searched.discard(key)
        if found:
            self._found[key] = found, loader

    def loader(self, pid: int, generation: int) -> str:
        """Return loader_of() of a process whose reason is OTHER_LOADER; otherwise an empty text."""
        return self._found.get((pid, generation), (None, ""))[1]

    def forget_ended(self, living: Mapping[int, Process]) -> None:
        """Discard the reasons of all processes except `living`."""
        lives = {(pid, living[pid].generation) for pid, _ in [*self._found, *self._searched] if pid in living}
        self._found = {life: found for life, found in self._found.items() if life in lives}
        self._searched &= lives
