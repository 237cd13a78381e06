"""What /proc and the cgroup file system say of a process: its mappings, cgroups, names and end.

Owns: reading and parsing them, bounded by what a process can make of them. Never: believes a process about itself, or
takes what it could not read for nothing. When a process has gone: None, empty or UNKNOWABLE; OSError where it says so.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

MOST_MAPS_BYTES = 1 << 23
DEEPEST = 32  # cgroups further in are taken for this one; the kernel side walks 16
NS_GET_PARENT = 0xB702
CUDA_NAMES = (b"libcuda.so", b"libfgpu.so")
UNKNOWABLE = frozenset({(0, 0)})  # a file that nobody will ever have probed

_LIBC = ctypes.CDLL(None)
_LIBC.fopen.restype = ctypes.c_void_p
_LIBC.fread.restype = ctypes.c_size_t
_LIBC.fread.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
_LIBC.fclose.argtypes = (ctypes.c_void_p,)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _field(text: bytes, name: bytes) -> bytes:
    return next((line[len(name) :] for line in text.split(b"\n") if line.startswith(name)), b"")


# -- who it is ------------------------------------------------------------------------------------------------------


def pids() -> list[int]:
    """Every process, threads aside."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def alive(pidfd: int) -> bool:
    """Has the process of this pidfd not ended yet?"""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def pid_of(pidfd: int) -> int:
    """The process of a pidfd, as we call it; -1: it is gone. Raises OSError, ValueError."""
    return int(_field(_read(f"/proc/self/fdinfo/{pidfd}"), b"Pid:"))


def pid_names(tgid: int) -> dict[int, int]:
    """What each pid namespace calls a process, its own first: inode of the namespace -> pid. Empty: it is gone."""
    names: dict[int, int] = {}
    try:
        pids = _field(_read(f"/proc/{tgid}/status"), b"NSpid:").split()
        space = os.open(f"/proc/{tgid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for pid in reversed(pids):
                names[os.fstat(space).st_ino] = int(pid)
                if len(names) < len(pids):
                    space, inner = fcntl.ioctl(space, NS_GET_PARENT), space
                    os.close(inner)
        finally:
            os.close(space)
    except OSError:
        return {}
    return names


# -- its mappings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapped file, as /proc/PID/maps names it."""

    path: str
    dev: int
    ino: int


def fgpu_mappings(pid: int) -> list[Mapping] | None:
    """The libcuda and shim files that a process has mapped executable, each once.

    None: nobody can tell, because it is gone, has no memory of its own or maps absurdly much.
    One foreign call reads all: in a thread, each `read` of Python's would fight for the interpreter.
    """
    with mmap.mmap(-1, MOST_MAPS_BYTES) as room:
        size = _read_into(room, f"/proc/{pid}/maps")
        if not 0 < size < MOST_MAPS_BYTES:
            return None
        lines = (line for name in CUDA_NAMES for line in _lines_with(room, size, name))
        files = dict.fromkeys(file for line in lines if (file := _executable(line)))
    return [_mapping(*file) for file in files]


def cuda_files(pid: int) -> frozenset[tuple[int, int]]:
    """(dev, ino) of every libcuda and shim mapped executable; UNKNOWABLE where nobody can tell."""
    found = fgpu_mappings(pid)
    return UNKNOWABLE if found is None else frozenset((mapped.dev, mapped.ino) for mapped in found)


def has_memory(pid: int) -> bool:
    """Does it live with memory of its own, as neither kernel threads nor the ended do?"""
    try:
        return not _read(f"/proc/{pid}/statm").startswith(b"0 ")
    except OSError:
        return False


def _read_into(room: mmap.mmap, path: str) -> int:
    file = _LIBC.fopen(path.encode(), b"re")
    if not file:
        return 0
    start = ctypes.c_char.from_buffer(room)
    size: int = _LIBC.fread(ctypes.byref(start), 1, len(room), file)
    _LIBC.fclose(file)
    return size


def _lines_with(text: mmap.mmap, size: int, name: bytes) -> Iterator[bytes]:
    at = text.find(b"/" + name, 0, size)
    while at >= 0:
        end = text.find(b"\n", at, size)
        yield text[text.rfind(b"\n", 0, at) + 1 : end]
        at = text.find(b"/" + name, end, size)


def _executable(line: bytes) -> tuple[bytes, bytes, bytes] | None:
    _, mode, _, dev, ino, path = line.split(maxsplit=5)
    if b"x" not in mode or not os.path.basename(path).startswith(CUDA_NAMES):
        return None
    return path, dev, ino


def _mapping(path: bytes, dev: bytes, ino: bytes) -> Mapping:
    major, minor = dev.split(b":")
    name = os.fsdecode(path.removesuffix(b" (deleted)"))
    return Mapping(name, os.makedev(int(major, 16), int(minor, 16)), int(ino))


# -- its cgroup -----------------------------------------------------------------------------------------------------


def cgroup2_root() -> Path | None:
    """Where the cgroup v2 hierarchy is mounted; None on a host that has none."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            if right.startswith("cgroup2 "):
                return Path(left.split()[4])
    return None


def cgroup_path(pid: int) -> str | None:
    """A process's v2 cgroup, relative to the hierarchy's root, e.g. `/fgpu/run-1`; None: it has gone."""
    try:
        return _cgroup(pid).removesuffix(" (deleted)") or None
    except OSError:
        return None


def cgroup_ids(root: Path, path: str) -> Iterator[int]:
    """The ids of a cgroup and its ancestors, leaf first, the root last; those that are gone are left out."""
    for folder in _folders(root, path.split("/")):
        try:
            yield os.stat(folder).st_ino
        except OSError:
            continue


def cgroups(pid: int, root: Path) -> list[int]:
    """Ids of the process's cgroup and those around it, leaf first; empty where unknown. Raises OSError: it is gone."""
    inside = _cgroup(pid).removeprefix("/").split("/")[:DEEPEST]
    if ".." in inside:  # outside our cgroup namespace
        return []
    return [os.stat(folder).st_ino for folder in _folders(root, inside)]


def _cgroup(pid: int) -> str:
    return os.fsdecode(_field(_read(f"/proc/{pid}/cgroup"), b"0::"))


def _folders(root: Path, inside: list[str]) -> list[str]:
    return list(accumulate(filter(None, inside), "{}/{}".format, initial=str(root)))[::-1]
