"""Transfer of limits from the pinned maps of another layout, which are then removed.

If the pinned pages have another layout than the agent's pages, the agent creates a new, empty ledger. This module
enters the charges of each level of the old ledger in the new ledger as orphaned bytes, so that nothing beyond the limit
is admitted. The reconcile thread then charges the bytes that NVML shows for the running programs, and releases the
bytes that the device does not hold.

The pages are hidden from the BPF programs of the other layout before the charges are read and entered. bpf/fgpu.h
describes the parts that all layouts have in common. This module runs in the agent's main thread at its start.
ProgramError: the limits of the other layout cannot be read, and stay in force. OSError after the pages were hidden:
nothing is admitted until the agent starts successfully and reads the pages again.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fgpu_ebpf import abi
from fgpu_ebpf.driver import attach
from fgpu_ebpf.driver.image import ProgramError
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.level_limits import LevelLimits, outside_of
from fgpu_ebpf.linux import bpf, procfs

_U32, _U64, _LIMIT_KEY, _LIMIT = struct.Struct("I"), struct.Struct("Q"), struct.Struct("QQ"), struct.Struct("QQ")
_HEAD = struct.Struct("4Q32x")  # version, cgroup, flags, place (the slot)
_USAGE = struct.Struct("8xQ16x")  # used
_UUID_BYTES = 16
_WITHDRAWN = 0  # the cgroup of a page that is about to be removed
SEEN_SECONDS = 2.0  # the longest wait until all BPF programs find the pages of new levels
_MAPS = ("pages", "shelf", "limits")


@dataclass(slots=True)
class _Level:
    """A level of another layout: its open page, the slot of the page, and bytes and flags of its limit by device."""

    page: int
    place: int
    limits: dict[int, tuple[int, int]] = field(default_factory=dict)


def folders(pins: Path) -> list[Path]:
    """Return the folders of other layouts beside this layout's folder `pins`."""
    try:
        return [entry for entry in pins.parent.iterdir() if re.fullmatch("v[0-9]+", entry.name) and entry != pins]
    except OSError:
        return []


def devices(pins: Path) -> dict[bytes, int]:
    """Return the ledger index by UUID of the devices that agents of other layouts have pinned."""
    found: dict[bytes, int] = {}
    for folder in folders(pins):
        with contextlib.suppress(OSError, ValueError), _opened(folder / "maps" / "devices") as fd:
            size = bpf.form(fd).value_size
            for index in range(abi.DEVICES):
                uuid = (bpf.lookup(fd, _U32.pack(index), size) or b"")[:_UUID_BYTES]
                if any(uuid):
                    found.setdefault(uuid, index)
    return found


def parked(pins: Path) -> str:
    """Return which other layouts have parked processes, or an empty text.

    Only an agent of that layout wakes these processes, and finds them by the map `parked`, so the layout must stay. A
    map that cannot be read counts as a map with entries.
    """
    found = []
    for folder in folders(pins):
        try:
            count = str(_parked_processes(folder / "maps" / "parked"))
        except (OSError, ValueError) as error:
            count = f"an unknown number ({error})"
        if count != "0":
            found.append(f"{count} in {folder}")
    where = ", ".join(found)
    return where and (
        f"another version of fgpu has parked processes ({where}): start that version, and type `fgpu wake --all`"
    )


def _parked_processes(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError), _opened(path) as fd:
        form = bpf.form(fd)
        return sum(1 for _ in bpf.items(fd, form.key_size, form.value_size))
    return 0


def take_over(pins: Path, ledger: Ledger) -> bool:
    """Enter the levels of other layouts in this ledger, and unpin the maps of these layouts.

    Return False if no other layout is pinned.

    Raise ProgramError and OSError (see the module).
    """
    found = folders(pins)
    for folder in found:
        carry_over(folder, int(folder.name[1:]), ledger)
        attach.detach(folder)
    return bool(found)


def carry_over(folder: Path, layout: int, ledger: Ledger) -> None:
    """Enter the levels of one folder in this ledger, except the levels that the ledger already has.

    `layout`: the number with which the pages of the folder begin. Raise ProgramError and OSError (see the module).
    """
    if not (folder / "maps" / "pages").exists():
        return
    with contextlib.ExitStack() as opened:
        try:
            maps = {name: opened.enter_context(_opened(folder / "maps" / name)) for name in _MAPS}
            levels = _levels(maps, layout, opened)
        except (OSError, ValueError) as error:
            raise ProgramError(
                f"limits of another version of fgpu in {folder} cannot be read ({error}): they stay in force; start "
                "that version again, or remove these limits with `fgpu detach`"
            ) from error
        _close(maps["shelf"], list(levels.values()))
        new = {cgroup: level for cgroup, level in levels.items() if ledger.page_missing(cgroup)}
        _enter(ledger, [_carried(cgroup, level) for cgroup, level in new.items()])


def _enter(ledger: Ledger, levels: list[LevelLimits]) -> None:
    unseen, are_seen = {level.cgroup for level in levels}, threading.Event()

    def see(cgroups: set[int]) -> None:
        unseen.difference_update(cgroups)
        if not unseen:
            are_seen.set()

    if levels:
        ledger.set_limits(levels, see)
        are_seen.wait(SEEN_SECONDS)
        _move_to_all(ledger)


def _move_to_all(ledger: Ledger) -> None:
    """Move each process to all its levels, because a call during the change may have found only some levels."""
    root, known = procfs.cgroup2_root(), set(ledger.tenants())
    for pid, process in ledger.processes().items():
        path = procfs.cgroup_path(pid)
        if root and path:
            levels = tuple(cgroup for cgroup in procfs.cgroup_ids(root, path) if cgroup in known)[-abi.LEVELS :]
            if levels != process.levels:
                ledger.move(pid, process.generation, levels)


def _close(shelf: int, levels: Collection[_Level]) -> None:
    """Replace all pages by one page without a cgroup, so that programs of the other layout admit and change nothing."""
    if not levels:
        return
    empty = bpf.create_array_page("fgpu_usage", bpf.form(next(iter(levels)).page).value_size)
    try:
        bpf.update_all(shelf, {_U32.pack(level.place): _U32.pack(empty) for level in levels})
    finally:
        os.close(empty)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = bpf.pinned(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _levels(maps: dict[str, int], layout: int, opened: contextlib.ExitStack) -> dict[int, _Level]:
    """Return the levels by cgroup. `opened` closes the pages. Raise ValueError if the maps have an unknown form."""
    if [bpf.form(maps[name]).key_size for name in ("pages", "shelf")] != [_U64.size, _U32.size]:
        raise ValueError("the keys of the maps have an unexpected size")
    levels: dict[int, _Level] = {}
    for key, value in bpf.items(maps["pages"], _U64.size, _U32.size, bpf.MOST_INNER):
        fd = bpf.map_by_id(_U32.unpack(value)[0])
        opened.callback(os.close, fd)
        version, cgroup, _, place = _HEAD.unpack_from(_read(fd))
        if version != layout or cgroup not in (_WITHDRAWN, _U64.unpack(key)[0]):
            raise ValueError("a usage page is of an unexpected version or cgroup")
        if cgroup != _WITHDRAWN:
            levels[cgroup] = _Level(fd, place)
    for cgroup, device, bytes_, flags in _limits(maps["limits"]):
        if cgroup in levels and device < abi.DEVICES:
            levels[cgroup].limits[device] = bytes_, flags
    return levels


def _limits(fd: int) -> Iterator[tuple[int, int, int, int]]:
    size = bpf.form(fd).value_size
    if bpf.form(fd).key_size != _LIMIT_KEY.size or size < _LIMIT.size:
        raise ValueError("the map of limits has an unknown form")
    for key, value in bpf.items(fd, _LIMIT_KEY.size, size):
        yield (*_LIMIT_KEY.unpack(key), *_LIMIT.unpack_from(value))


def _read(fd: int) -> bytes:
    size = bpf.form(fd).value_size
    if size < _HEAD.size + abi.DEVICES * _USAGE.size:
        raise ValueError("a usage page is too short")
    return bpf.lookup(fd, _U32.pack(0), size) or bytes(size)


def _carried(cgroup: int, level: _Level) -> LevelLimits:
    """Return the limits of a level, without FGPU_KILL: shims of the other layout cannot request admission."""
    raw, flags = _read(level.page), 0
    used = [_USAGE.unpack_from(raw, _HEAD.size + device * _USAGE.size)[0] for device in range(abi.DEVICES)]
    for _, its in level.limits.values():
        flags |= its & abi.LimitFlag.OBSERVE
    return LevelLimits(
        cgroup, {device: bytes_ for device, (bytes_, _) in level.limits.items()}, flags,
        uncommitted={device for device, (_, its) in level.limits.items() if its & abi.uncommitted(device)},
        orphaned={device: bytes_ for device, bytes_ in enumerate(used) if bytes_},
        outside={device: outside_of(its) for device, (_, its) in level.limits.items()},
    )  # fmt: skip
