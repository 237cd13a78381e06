"""Loading of the BPF programs: the compiler's output (an image) is parsed, loaded into the kernel and pinned.

A pinned map that already has the form in the image is kept with its contents. This module runs in the agent's main
thread at its start, and in `fgpu load`. The kernel verifies the programs in several threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.linux import bpf

# These programs read the names of cgroups in the kernel's memory, which lockdown=confidentiality forbids.
OF_CGROUPS = frozenset({"cgroup_attach", "cgroup_made", "cgroup_populated", "cgroup_removed"})
OF_OPENS = "device_open"  # only `onBypass: deny` needs this program, and a kernel may lack programs of its type
OPTIONAL = OF_CGROUPS | {OF_OPENS}
RAW_TRACEPOINTS = frozenset({"process_exit", "process_exec", "program_began", "adjust"}) | OF_CGROUPS
INNER = "page_template"  # this map has the form of the inner maps of all maps of maps
UNPINNED = frozenset({INNER, "blanks"})  # maps without contents to keep
RUN_AGAIN = ("again", "call_return")  # an array of programs, and the name of its only program
SHORTER = {"host": 8, "allocations": 262_144}  # sizes of an older version's maps that may stay pinned
_LOAD_MAP = 0x1018  # the first two bytes of an instruction that loads a map
_INSTRUCTION, _NUMBER = struct.Struct("<HhI"), struct.Struct("<I")


class ProgramError(Exception):
    """The BPF programs cannot be loaded. The text has the reason and, if known, the fix."""


class Image(NamedTuple):
    """Maps and programs by name. An instruction that loads a map contains the map's position in `maps`."""

    maps: Mapping[str, bpf.Form]
    programs: Mapping[str, bytes]


def parsed(text: str) -> Image:
    """Parse the compiler's output. Raise ValueError if the output is not an image."""
    try:
        found = json.loads(text)
        maps = {name: bpf.Form(*map(int, form)) for name, form in found["maps"].items()}
        programs = {name: bytes.fromhex(code) for name, code in found["programs"].items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not an image of the BPF programs: {error!r}") from error
    return Image(maps, programs)


def load(image: Image, pins: Path) -> None:
    """Load all programs, and pin programs and maps under PINS/programs and PINS/maps. Raise ProgramError on failure."""
    for folder in ("maps", "programs"):
        (pins / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        maps = _maps(image, pins / "maps", opened)
        _write_sizes(dict(zip(image.maps, maps, strict=True)))
        names = sorted(image.programs, key=lambda name: -len(image.programs[name]))
        with ThreadPoolExecutor() as threads:  # the kernel verifies in parallel; the longest program is loaded first
            loaded = list(threads.map(lambda name: _program(name, image.programs[name], maps), names))
        found = {name: fd for name, fd in zip(names, loaded, strict=True) if fd is not None}
        for fd in found.values():
            opened.callback(os.close, fd)
        _run_again(image, maps, found)
        for name, fd in found.items():
            _pin(fd, pins / "programs" / name)
        for name in image.programs.keys() - found.keys():  # an older version's program must not be attached
            (pins / "programs" / name).unlink(missing_ok=True)


def _maps(image: Image, folder: Path, opened: contextlib.ExitStack) -> list[int]:
    """Open the pinned maps, create all other maps, and return the descriptors in the order of the image.

    New maps are pinned, except the maps in UNPINNED.
    """
    found: dict[str, int] = {}
    for name in sorted(image.maps, key=lambda name: name != INNER):
        form, path = image.maps[name], folder / name
        is_outer = form.map_type in (bpf.ARRAY_OF_MAPS, bpf.HASH_OF_MAPS)
        try:
            if name not in UNPINNED and path.exists():
                found[name] = bpf.pinned(path)
                opened.callback(os.close, found[name])
                _check(path, bpf.form(found[name]), form)
                continue
            found[name] = bpf.create(name, form, found[INNER] if is_outer else 0)
            opened.callback(os.close, found[name])
            if name not in UNPINNED:
                bpf.pin(found[name], path)
        except OSError as error:
            raise ProgramError(f"cannot create or pin {path} ({error}): is a bpffs mounted at /sys/fs/bpf?") from error
    return [found[name] for name in image.maps]


def _check(path: Path, found: bpf.Form, wanted: bpf.Form) -> None:
    """Raise ProgramError if a pinned map has another form: the programs would misread its entries."""
    known = wanted._replace(max_entries=SHORTER.get(path.name, wanted.max_entries))
    if found not in (wanted, known):
        raise ProgramError(
            f"{path} is of another version of fgpu (type, sizes and flags {tuple(found)}, not {tuple(wanted)}): the "
            "limits stay in force; start that version again, or remove the limits with `fgpu detach`"
        )


def _write_sizes(maps: Mapping[str, int]) -> None:
    """Write the sizes of the maps that tenants share to the map `sizes`: a pinned map may be smaller than a new map."""
    for shared in abi.Shared if "sizes" in maps else ():
        most = bpf.form(maps[shared.name.lower()]).max_entries
        bpf.update(maps["sizes"], _NUMBER.pack(shared), struct.pack("Q", most))


def _program(name: str, code: bytes, maps: list[int]) -> int | None:
    """Load a program and return its descriptor; None: the program is optional, and this kernel refuses the program."""
    whole = bytearray(code)
    for at in range(0, len(code), _INSTRUCTION.size):
        operation, _, number = _INSTRUCTION.unpack_from(code, at)
        if operation & 0xF0FF == _LOAD_MAP:
            _NUMBER.pack_into(whole, at + 4, maps[number])
    of_processes = bpf.RAW_TRACEPOINT if name in RAW_TRACEPOINTS else bpf.KPROBE
    try:
        return bpf.load_program(name, bytes(whole), bpf.CGROUP_DEVICE if name == OF_OPENS else of_processes)
    except OSError as error:
        if name in OPTIONAL:
            return None
        release = os.uname().release
        raise ProgramError(
            f"Linux {release} rejects the program {name} ({os.strerror(error.errno or 0)}): update the kernel, or fgpu"
        ) from error


def _run_again(image: Image, maps: list[int], programs: Mapping[str, int]) -> None:
    """Enter a program in the array through which the program calls itself. A pinned array keeps the entry."""
    array, program = RUN_AGAIN
    if program in programs:
        try:
            bpf.update(maps[list(image.maps).index(array)], _NUMBER.pack(0), _NUMBER.pack(programs[program]))
        except OSError as error:
            raise ProgramError(f"cannot write the program {program} to the map {array} ({error})") from error


def _pin(fd: int, path: Path) -> None:
    """Pin a program under another name and rename the pin, so that the path always exists.

    Raise ProgramError on failure.
    """
    beside = path.with_name(path.name + "-new")  # a name in a bpffs may not contain a dot
    try:
        beside.unlink(missing_ok=True)
        bpf.pin(fd, beside)
        os.rename(beside, path)
    except OSError as error:
        raise ProgramError(f"cannot pin {path} ({error}): is a bpffs mounted at /sys/fs/bpf?") from error
