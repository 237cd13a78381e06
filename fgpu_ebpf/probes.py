"""Finds libcuda and shim files, and ties the pinned programs to them.

Owns: the links under PINS/links and the map `files`. Never: compiles (the loader does), or asks who maps a file for
anything but its place. On failure: ProbeError with the mend; a file that cannot be probed is not entered in `files`,
so its processes get no answer to their hello and no memory.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf import bpf, elf, innerpath, links, procfs, prologue
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.pages import Function

SHIM = {"fgpu_admit": "admit", "fgpu_release": "give_back"}
DRIVER_PROGRAMS = ("call_return", "call_enter")
REQUIRED = {
    "cuMemAlloc_v2": Function.ALLOC,
    "cuMemFree_v2": Function.FREE,
    "cuMemCreate": Function.CREATE,
    "cuMemMap": Function.MAP,
    "cuMemUnmap": Function.UNMAP,
    "cuMemRelease": Function.RELEASE,
    "cuDevicePrimaryCtxRetain": Function.RETAIN,
    "cuDevicePrimaryCtxRelease_v2": Function.PRIMARY_RELEASE,
    "cuCtxCreate_v2": Function.CONTEXT_V2,
    "cuCtxDestroy_v2": Function.DESTROY,
}
OPTIONAL = {
    "cuMemAllocManaged": Function.ALLOC_MANAGED,
    "cuMemAllocPitch_v2": Function.ALLOC_PITCH,
    "cuMemRetainAllocationHandle": Function.RETAIN_HANDLE,
    "cuMemExportToShareableHandle": Function.EXPORT,
    "cuIpcGetMemHandle": Function.EXPORT_POINTER,
    "cuDevicePrimaryCtxReset_v2": Function.PRIMARY_RESET,
    "cuCtxCreate_v3": Function.CONTEXT_V3,
    "cuCtxCreate_v4": Function.CONTEXT_V4,
    "cuArrayCreate_v2": Function.ARRAY,
    "cuArray3DCreate_v2": Function.ARRAY_3D,
    "cuMipmappedArrayCreate": Function.ARRAY_MIPMAPPED,
    "cuArrayDestroy": Function.ARRAY_DESTROY,
    "cuMipmappedArrayDestroy": Function.ARRAY_DESTROY,
}
TRACEPOINTS = {
    "process_exit": "sched_process_exit",
    "process_exec": "sched_process_exec",
    "program_began": "sched_process_exec",
}
OPTIONAL_TRACEPOINTS = {
    "cgroup_attach": "cgroup_attach_task",
    "cgroup_made": "cgroup_mkdir",
    "cgroup_populated": "cgroup_notify_populated",
    "cgroup_removed": "cgroup_rmdir",
}
LIBRARY_FOLDERS = (
    "usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "lib64", "lib", ".",
    "usr/local/nvidia/lib64", "usr/local/nvidia/lib", "usr/lib/wsl/lib", "usr/local/cuda/compat",
)  # fmt: skip


File = tuple[int, int]  # (dev, ino), as /proc/PID/maps names it
_ALL = (*SHIM, *REQUIRED, *OPTIONAL)


class ProbeError(Exception):
    """What cannot be probed, and what mends it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A file to probe: `way` opens it from here; (dev, ino) is how /proc/PID/maps names it, and `path` how people do.

    `pinned`: its links outlive the agent; a file in a container's own layer would keep its mount busy by them.
    """

    path: str
    dev: int
    ino: int
    pinned: bool
    way: str
    through: bool = False  # `way` is a link of the kernel's own
    root: str = ""  # where `way` begins, with no link on it; empty: nobody else has chosen it

    @classmethod
    def of(cls, path: str) -> Target:
        """A file of the host's own."""
        place = os.path.realpath(path)
        return cls(place, *procfs.as_mapped(place), True, place)

    def open(self) -> int:
        """A descriptor of this very file, whatever has been put in its place meanwhile. Raises OSError."""
        fd = self._open()
        try:
            if procfs.mapped_as(fd) != (self.dev, self.ino):
                raise OSError(errno.ESTALE, "another file is in its place")
        except OSError:
            os.close(fd)
            raise
        return fd

    def _open(self) -> int:
        if not self.root:
            return procfs.open_regular(self.way, self.through)
        place = innerpath.find_mapped(self.root, self.way)
        try:
            return procfs.open_regular(f"/proc/self/fd/{place}", follow=True)
        finally:
            os.close(place)


# -- finding -------------------------------------------------------------------------------------------------------


def driver_libraries(root: Path, name: str) -> list[Path]:
    """Every file of this name in a driver root's library folders, each once; the loader's cache comes first for /."""
    candidates = [root / folder / name for folder in LIBRARY_FOLDERS]
    if root == Path("/"):
        candidates = _cached_libraries(name) + candidates
    found: dict[Path, None] = {}
    for path in candidates:
        with contextlib.suppress(OSError):
            found.setdefault(path.resolve(strict=True))
    return list(found)


def _cached_libraries(name: str) -> list[Path]:
    return [Path(line.split(" => ")[1]) for line in _loader_cache() if line.split(" ")[0].strip() == name]


@functools.cache
def _loader_cache() -> list[str]:
    command = ["/sbin/ldconfig", "-p"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False, env={})
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()


def target_of(pid: int, mapped: procfs.Mapping) -> Target:
    """A file that a process maps. Raises OSError: it cannot be had any more, or is no file that can be opened.

    Paths are the process's own choice, so each is tried and what it opens compared; map_files leads to what is mapped.
    """
    ways = (
        Target(mapped.path, mapped.dev, mapped.ino, True, mapped.path, root="/"),
        Target(mapped.path, mapped.dev, mapped.ino, False, f"/proc/{pid}/map_files/{mapped.place}", True),
        Target(mapped.path, mapped.dev, mapped.ino, False, mapped.path, root=f"/proc/{pid}/root"),
    )
    for target in ways[:-1]:
        with contextlib.suppress(OSError):
            os.close(target.open())
            return target
    os.close(ways[-1].open())
    return ways[-1]


# -- offsets -------------------------------------------------------------------------------------------------------


def symbol_offsets(path: str, names: Iterable[str]) -> dict[str, int]:
    """File offsets of a library's exported functions, those that it has. ProbeError: not an ELF library."""
    try:
        fd = procfs.open_regular(os.path.realpath(path))
        try:
            return _offsets(fd, list(names))
        finally:
            os.close(fd)
    except (elf.ElfError, OSError) as error:
        raise ProbeError(f"{path} cannot be read as a library ({error})") from error


def _offsets(fd: int, names: Collection[str]) -> dict[str, int]:
    return prologue.shifted(fd, elf.function_offsets(fd, names))


_looked_up: dict[File, dict[str, int]] = {}  # of the host's own files, until they are attached to


def look_up(paths: Iterable[Path]) -> None:
    """Finds the functions of these files, so that attaching to them later takes milliseconds. Raises ProbeError."""
    for path in paths:
        target = Target.of(str(path))
        _looked_up[target.dev, target.ino] = symbol_offsets(target.path, _ALL)


def missing_functions(path: str) -> list[str]:
    """What a driver library would need and lacks."""
    try:
        return sorted(set(REQUIRED) - set(symbol_offsets(path, REQUIRED)))
    except ProbeError as error:
        return [str(error)]


# -- attaching -----------------------------------------------------------------------------------------------------


class Probes:
    """The links of one set of programs."""

    def __init__(self, pins: Path, digest: str, ledger: Ledger) -> None:
        self._programs = pins / "programs"
        self._links = pins / "links"
        self._digest = digest
        self._ledger = ledger
        self._held: dict[File, list[int]] = {}
        self._pinned: dict[File | None, set[str]] = {}  # names of links that are in the kernel's hands
        self._links.mkdir(mode=0o700, exist_ok=True)
        self._known = self._pinned_files()

    def _pinned_files(self) -> set[File]:
        """The files whose links have all survived an earlier agent; all others are forgotten."""
        there: dict[File, set[str]] = {}
        for path in self._links.glob(f"{self._digest}-*-*-*"):
            _, dev, ino, what = path.name.split("-")
            there.setdefault((int(dev, 16), int(ino, 16)), set()).add(what)
        self._ledger.forget_files()
        for file, kinds in there.items():
            if _all_of(len(kinds) - 1) in kinds:
                self._ledger.enter_file(*file)
                self._pinned[file] = {f"{self._name(file)}-{what}" for what in kinds}
            else:
                links.remove(self._links.glob(f"{self._name(file)}-*"))
        return set(self._pinned)  # type: ignore[arg-type]

    def lost(self) -> frozenset[File | None]:
        """Files some of whose pinned links are there no more, so that the kernel sees nothing; None: process events."""
        try:
            there = set(os.listdir(self._links))
        except FileNotFoundError:
            there = set()
        return frozenset(file for file, names in self._pinned.items() if not names <= there)

    def attach_again(self, lost: Set[File | None]) -> None:
        """Puts the process events back, and lets go of files that attach() is to see anew. ProbeError: it cannot."""
        self._links.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in lost:
            if file is None:
                self.attach_process_ends()
            else:
                self.let_go(file)

    @property
    def known(self) -> frozenset[File]:
        """(dev, ino) of every probed file."""
        return frozenset(self._known)

    def attach_process_ends(self) -> None:
        """Links the process events. ProbeError: this kernel does not say when a process is gone."""
        for program, event in TRACEPOINTS.items():
            try:
                self._attach_tracepoint(program, event)
            except FileNotFoundError as error:
                raise ProbeError(f"{self._programs / program} is no longer pinned: restart the agent") from error
            except OSError as error:
                raise ProbeError(f"this kernel's {event} does not tell a process's end: {error}") from error
        for program, event in OPTIONAL_TRACEPOINTS.items():
            with contextlib.suppress(OSError):  # the slow look at the cgroups stands in
                self._attach_tracepoint(program, event)

    def _attach_tracepoint(self, program: str, event: str) -> None:
        path = self._links / f"{self._digest}-{program}"
        if path.exists():
            self._pinned.setdefault(None, set()).add(path.name)
            return
        fd = bpf.pinned(self._programs / program)
        try:
            link = bpf.attach_raw_tracepoint(fd, event)
        finally:
            os.close(fd)
        bpf.pin(link, path)
        os.close(link)
        self._pinned.setdefault(None, set()).add(path.name)

    def attach(self, target: Target) -> None:
        """Probes a libcuda or shim file and enters it in `files`. ProbeError: it lacks a function that must be seen,
        or cannot be read; nothing is left of the attempt.
        """
        file = target.dev, target.ino
        if file in self._known:
            return
        try:
            fd = target.open()
            try:
                offsets = _looked_up.pop(file, None) or _offsets(fd, _ALL)
                self._attach(target, f"/proc/self/fd/{fd}", offsets)
            finally:
                os.close(fd)
            if target.pinned:
                self._mark(file)
            self._ledger.enter_file(*file)
            self._known.add(file)
        except (elf.ElfError, OSError) as error:
            self.let_go(file)
            raise ProbeError(f"{target.path} cannot be probed ({error})") from error
        except ProbeError:
            self.let_go(file)
            raise

    def _attach(self, target: Target, path: str, offsets: Mapping[str, int]) -> None:
        if "fgpu_admit" in offsets:  # it exports the driver's names too: those are not the driver
            _need(target, SHIM, offsets)
            for symbol, program in SHIM.items():
                self._link(target, path, program, [(offsets[symbol], Function.NONE)])
            return
        _need(target, REQUIRED, offsets)
        places = [(offsets[symbol], f) for symbol, f in (REQUIRED | OPTIONAL).items() if symbol in offsets]
        # The returns first: an entry seen without its return would stay in flight.
        returns, entries = DRIVER_PROGRAMS
        self._link(target, path, returns, places, at_return=True)
        self._link(target, path, entries, places)

    def _mark(self, file: File) -> None:
        """That all of its links are there, and how many these are, for the next agent."""
        pinned = self._pinned[file]
        mark = self._links / f"{self._name(file)}-{_all_of(len(pinned))}"
        mark.mkdir(exist_ok=True)
        pinned.add(mark.name)

    def _name(self, file: File) -> str:
        return f"{self._digest}-{file[0]:x}-{file[1]:x}"

    def _link(
        self, target: Target, opens: str, program: str, places: Sequence[tuple[int, int]], at_return: bool = False
    ) -> None:
        file = target.dev, target.ino
        fd = bpf.pinned(self._programs / program)
        try:
            made = bpf.attach_uprobes(fd, opens, places, at_return)
        finally:
            os.close(fd)
        if target.pinned:
            names = links.pin(made, self._links / f"{self._name(file)}-{program}")
            self._pinned.setdefault(file, set()).update(names)
        else:
            self._held.setdefault(file, []).extend(made)

    def drop_older(self) -> None:
        """Takes away the links of earlier programs; these ones see everything already."""
        links.remove(path for path in self._links.iterdir() if not path.name.startswith(self._digest))

    def drop_unused(self, used: Set[File]) -> None:
        """Takes away the links to files that nobody can be using any more."""
        for file in self._known - used:
            self.let_go(file)

    def let_go(self, file: File) -> None:
        """Ends the probes of a file: they keep its mount busy."""
        self._pinned.pop(file, None)
        links.close(self._held.pop(file, ()))
        links.remove(self._links.glob(f"{self._name(file)}-*"))
        self._ledger.forget_file(*file)
        self._known.discard(file)


def _all_of(count: int) -> str:
    """What stands beside so many links of a file when they are all."""
    return f"all{count}"


def _need(target: Target, wanted: Iterable[str], offsets: Mapping[str, int]) -> None:
    missing = sorted(set(wanted) - set(offsets))
    if missing:
        raise ProbeError(f"{target.path} lacks {', '.join(missing)}: no driver that fgpu knows")


def folders_of_other_layouts(pins: Path) -> list[Path]:
    """Pinned folders beside this one: of a version with other structs, whose probes count for nobody."""
    try:
        return [entry for entry in pins.parent.iterdir() if entry.name.startswith("v") and entry != pins]
    except OSError:
        return []


def detach(pins: Path) -> None:
    """Takes away everything that is pinned."""
    for folder in (pins / "links", pins / "programs", pins / "maps"):
        if folder.is_dir():
            links.remove(folder.iterdir())
            folder.rmdir()
    for stamp in pins.glob("loaded-*"):
        stamp.rmdir()
    if pins.is_dir():
        pins.rmdir()
