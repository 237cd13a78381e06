"""The functions of libcuda and the shim that are probed, and the offsets of the probes in a file.

This module runs in the agent's main thread and library workers, and in `fgpu doctor`. The file may belong to a tenant,
so reads of the file are bounded. The text of a ProbeError names the fix.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf.abi import Function
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
    "cuMemMapArrayAsync": Function.EXPORT_RANGE,  # a sparse array keeps the memory of a handle that is released
    "cuMemMapArrayAsync_ptsz": Function.EXPORT_RANGE,
    "cuMemPoolExportToShareableHandle": Function.EXPORT_POOL,
    "cuMemImportFromShareableHandle": Function.IMPORT,
    "cuMemPoolImportFromShareableHandle": Function.IMPORT,
    "cuIpcOpenMemHandle_v2": Function.IMPORT,
    "cuIpcOpenMemHandle": Function.IMPORT,
    "cuDevicePrimaryCtxReset_v2": Function.PRIMARY_RESET,
    "cuDevicePrimaryCtxReset": Function.PRIMARY_RESET,
    "cuDevicePrimaryCtxRelease": Function.PRIMARY_RELEASE,
    "cuCtxDestroy": Function.DESTROY,
    "cuGreenCtxCreate": Function.GREEN,
    "cuGreenCtxDestroy": Function.GREEN_DESTROY,
    "cuCtxCreate_v3": Function.CONTEXT_V3,
    "cuCtxCreate_v4": Function.CONTEXT_V4,
    "cuArrayCreate_v2": Function.ARRAY,
    "cuArray3DCreate_v2": Function.ARRAY_3D,
    "cuMipmappedArrayCreate": Function.ARRAY_MIPMAPPED,
    "cuArrayDestroy": Function.ARRAY_DESTROY,
    "cuMipmappedArrayDestroy": Function.ARRAY_DESTROY,
}
MARK = "cuInit"  # probed only by the program that is attached last, so its breakpoint proves both programs
_ALL = (*SHIM, *REQUIRED, *OPTIONAL, MARK)

_CODE_BYTES = 16  # length of the beginning of a function that shift() reads
_COMPARES = {b"\x81\x3d": 10, b"\x83\x3d": 7}  # opcode -> length of the instruction in bytes
_EMULATED = frozenset([*range(0x70, 0x80), *range(0x50, 0x58)])  # short jcc; push


class ProbeError(Exception):
    """A file cannot be probed. The text has the reason and, if known, the fix."""


def symbol_offsets(path: str, names: Iterable[str]) -> dict[str, int]:
    """Return the file offsets of the named functions that a library exports. Raise ProbeError for any other file."""
    try:
        fd = mapped_files.open_regular(os.path.realpath(path))
        try:
            return _offsets(fd, list(names))
        finally:
            os.close(fd)
    except (elf.ElfError, OSError) as error:
        raise ProbeError(f"{path} cannot be read as a library ({error})") from error


def _offsets(fd: int, names: Collection[str]) -> dict[str, int]:
    """Return the file offsets at which the functions are probed. Raise OSError on failure."""
    found = elf.function_offsets(fd, names)
    return {name: at + shift(os.pread(fd, _CODE_BYTES, at)) for name, at in found.items()}


def shift(code: bytes) -> int:
    """Return the offset from the beginning of a function with this code (x86-64) at which a uprobe is cheap.

    A kernel that does not emulate the probed instruction single-steps the instruction out of line. A hit then takes
    some 10 us instead of 0.5 us. In the drivers 470 to 570, 595 and 615, but not in 580, every call begins with a check
    whether the driver has been shut down (`cmpl $imm, disp(%rip)`), which is not emulated. An emulated conditional jump
    follows the check. At this jump the function has changed nothing yet: the arguments are in their registers, and the
    return address is on top of the stack. A probe is never moved past a jump or past an instruction that changes the
    stack. A function with any other beginning is probed at its first byte.
    """
    length = _COMPARES.get(code[:2], 0)
    return length if code[length : length + 1] and code[length] in _EMULATED else 0


_looked_up: dict[File, dict[str, int]] = {}  # offsets in the host's own files, until probes are attached


def look_up(paths: Iterable[Path]) -> None:
    """Find the functions of these files in advance, so that attaching takes milliseconds.

    Raise ProbeError on failure.
    """
    for path in paths:
        target = Target.of(str(path))
        _looked_up[target.dev, target.ino] = symbol_offsets(target.path, _ALL)


def looked_up(file: File) -> dict[str, int] | None:
    """Remove the offsets that look_up() has found in a file from the cache. Return these offsets, or None."""
    return _looked_up.pop(file, None)


def missing_functions(path: str) -> list[str]:
    """Return the required functions that a driver library lacks, or the reason why the library is unreadable."""
    try:
        return sorted(set(REQUIRED) - set(symbol_offsets(path, REQUIRED)))
    except ProbeError as error:
        return [str(error)]


@dataclass(frozen=True, slots=True)
class Plan:
    """The probes of a file.

    `programs`: for each BPF program its name, pairs of file offset and cookie, and whether the program runs at the
    return. `check`: the offset at which a breakpoint proves that the file is probed.
    """

    role: Role
    programs: tuple[tuple[str, tuple[tuple[int, int], ...], bool], ...]
    check: int = breakpoints.UNCHECKED


def plan(fd: int, path: str, role: Role, offsets: Mapping[str, int] | None = None) -> Plan:
    """Return how to probe an open file of this role.

    A file with libfgpu's name that is not a shim of this host and lacks the driver's functions gets no probes.

    Args:
        fd: the file.
        path: the file's path, for messages.
        role: the file's role.
        offsets: the offsets of the functions in the file, if known.

    Raises:
        ProbeError: the file lacks a required function, or none of its functions has a probe that can be checked.
        ElfError: the file is not a library.
        OSError: the file cannot be read.
    """
    offsets = offsets or _offsets(fd, _ALL)
    if role is Role.SHIM:
        _need(path, SHIM, offsets)
        shim = tuple((program, ((offsets[symbol], Function.NONE.value),), False) for symbol, program in SHIM.items())
        return Plan(role, shim, _check(fd, path, (offsets[symbol] for symbol in reversed(SHIM))))  # last attached first
    if os.path.basename(path).startswith(SHIM_NAME) and not set(REQUIRED) <= set(offsets):
        return Plan(Role.NONE, ())
    _need(path, REQUIRED, offsets)
    there = {symbol: function for symbol, function in (REQUIRED | OPTIONAL).items() if symbol in offsets}
    places = tuple((offsets[symbol], role.cookie(function)) for symbol, function in there.items())
    # Return probes are attached first: a call whose entry is recorded without its return would stay in flight.
    returns, entries = DRIVER_PROGRAMS
    mark = ((offsets[MARK], role.cookie(Function.NONE)),) if MARK in offsets else ()
    check = _check(fd, path, (at for at, _ in (*mark, *places)))
    return Plan(role, ((returns, places, True), (entries, places + mark, False)), check)


def _check(fd: int, path: str, offsets: Iterable[int]) -> int:
    found = breakpoints.choose(fd, offsets)
    if found is None:
        raise ProbeError(f"no function of {path} has a probe that can be checked: fgpu does not support this driver")
    return found


def _need(path: str, wanted: Iterable[str], offsets: Mapping[str, int]) -> None:
    missing = sorted(set(wanted) - set(offsets))
    if missing:
        raise ProbeError(f"{path} lacks {', '.join(missing)}: fgpu supports no driver or shim without these functions")
