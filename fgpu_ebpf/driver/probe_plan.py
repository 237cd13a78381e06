"""The functions of libcuda and the shim that are probed, and their offsets in a file.

`attach` and the agent's library workers use this module. The file may be a tenant's, so what is read of it is bounded.
ProbeError names the fix.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf.abi import Function
from fgpu_ebpf.driver import prologue
from fgpu_ebpf.driver.library_class import Role
from fgpu_ebpf.driver.library_files import Target
from fgpu_ebpf.linux import breakpoints, elf, mapped_files
from fgpu_ebpf.linux.procmaps import File

SHIM = {"fgpu_admit": "admit", "fgpu_release": "give_back"}
SHIM_NAME = "libfgpu.so"
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
    "cuMemGetHandleForAddressRange": Function.EXPORT_RANGE,
    "cuMemPoolExportToShareableHandle": Function.EXPORT_POOL,
    "cuMemImportFromShareableHandle": Function.IMPORT,
    "cuMemPoolImportFromShareableHandle": Function.IMPORT,
    "cuIpcOpenMemHandle_v2": Function.IMPORT,
    "cuIpcOpenMemHandle": Function.IMPORT,
    "cuDevicePrimaryCtxReset_v2": Function.PRIMARY_RESET,
    "cuCtxCreate_v3": Function.CONTEXT_V3,
    "cuCtxCreate_v4": Function.CONTEXT_V4,
    "cuArrayCreate_v2": Function.ARRAY,
    "cuArray3DCreate_v2": Function.ARRAY_3D,
    "cuMipmappedArrayCreate": Function.ARRAY_MIPMAPPED,
    "cuArrayDestroy": Function.ARRAY_DESTROY,
    "cuMipmappedArrayDestroy": Function.ARRAY_DESTROY,
}
MARK = "cuInit"  # probed by the program that is attached last, and by no other: its breakpoint proves both
_ALL = (*SHIM, *REQUIRED, *OPTIONAL, MARK)


class ProbeError(Exception):
    """A file cannot be probed; the text names the fix."""


def symbol_offsets(path: str, names: Iterable[str]) -> dict[str, int]:
    """Return the file offsets of those functions that a library exports. Raises ProbeError: it is not a library."""
    try:
        fd = mapped_files.open_regular(os.path.realpath(path))
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
    """Find the functions of these files, so that attaching to them later takes milliseconds. Raises ProbeError."""
    for path in paths:
        target = Target.of(str(path))
        _looked_up[target.dev, target.ino] = symbol_offsets(target.path, _ALL)


def looked_up(file: File) -> dict[str, int] | None:
    """Return the offsets that look_up() has found in a file and remove them from the cache. None: there are none."""
    return _looked_up.pop(file, None)


def missing_functions(path: str) -> list[str]:
    """Return the required functions that a driver library lacks, or why it cannot be read."""
    try:
        return sorted(set(REQUIRED) - set(symbol_offsets(path, REQUIRED)))
    except ProbeError as error:
        return [str(error)]


@dataclass(frozen=True, slots=True)
class Plan:
    """The probes of a file. `programs`: (name, (offset, cookie)s, whether at return); `check`: one of the offsets."""

    role: Role
    programs: tuple[tuple[str, tuple[tuple[int, int], ...], bool], ...]
    check: int = breakpoints.UNCHECKED


def plan(fd: int, path: str, role: Role, offsets: Mapping[str, int] | None = None) -> Plan:
    """Return how to probe an open file of this role. Raises ProbeError: it lacks a required function; ElfError.

    A file that has libfgpu's name, is no shim of this host and lacks the driver's functions is not probed at all.
    """
    offsets = offsets or _offsets(fd, _ALL)
    if role is Role.SHIM:
        _need(path, SHIM, offsets)
        shim = tuple((program, ((offsets[symbol], Function.NONE.value),), False) for symbol, program in SHIM.items())
        return Plan(role, shim, _check(fd, path, (offsets[symbol] for symbol in reversed(SHIM))))  # the last comes last
    if os.path.basename(path).startswith(SHIM_NAME) and not set(REQUIRED) <= set(offsets):
        return Plan(Role.NONE, ())
    _need(path, REQUIRED, offsets)
    there = {symbol: function for symbol, function in (REQUIRED | OPTIONAL).items() if symbol in offsets}
    places = tuple((offsets[symbol], role.cookie(function)) for symbol, function in there.items())
    # Returns are attached first: an entry that is seen without its return would stay in flight.
    returns, entries = DRIVER_PROGRAMS
    mark = ((offsets[MARK], role.cookie(Function.NONE)),) if MARK in offsets else ()
    check = _check(fd, path, (at for at, _ in (*mark, *places)))
    return Plan(role, ((returns, places, True), (entries, places + mark, False)), check)


def _check(fd: int, path: str, offsets: Iterable[int]) -> int:
    found = breakpoints.choose(fd, offsets)
    if found is None:
        raise ProbeError(f"no function of {path} has a probe that can be checked: not a driver that fgpu knows")
    return found


def _need(path: str, wanted: Iterable[str], offsets: Mapping[str, int]) -> None:
    missing = sorted(set(wanted) - set(offsets))
    if missing:
        raise ProbeError(f"{path} lacks {', '.join(missing)}: not a driver that fgpu knows")
