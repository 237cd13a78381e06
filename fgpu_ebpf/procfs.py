"""What /proc and the cgroup file system say of a process: its mappings, cgroups, names and end.

Owns: reading and parsing them, bounded by what a process can make of them. Never: believes a process about itself, or
takes what it could not read for nothing. When a process has gone: None, empty or UNKNOWABLE; OSError where it says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path

from fgpu_ebpf import mappings

MOST_MOUNTS = 1 << 14
DEEPEST = 32  # cgroups further in are taken for this one; the kernel side walks 16
NS_GET_PARENT = 0xB702
BOOKS = b"/run/fgpu/books"  # where the shim of an image with a limit of its own keeps them
CUDA_NAMES = (b"libcuda.so", b"libfgpu.so")

_LIBC = ctypes.CDLL(None)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_MAP_FAILED = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1
_AUX, _AT_BASE = struct.Struct("2Q"), 7
_PIDFD_GET_PID_NAMESPACE = 0xFF05  # Linux 6.11
_PIDFD_GET_INFO, _INFO = 0xC040FF0B, struct.Struct("QQII40x")  # Linux 6.13: struct pidfd_info
_INFO_PID_AND_CGROUP = 0b101
_UNKNOWN_TO_PIDFDS = (errno.ENOTTY, errno.EINVAL)
_TRIES = 10
_PF_EXITING = 0x4  # of a task's flags: set before its end is told to anybody


def read(path: str) -> bytes:
    """A small file of /proc or of the cgroup file system, at most 64 KiB. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def raise_descriptor_limit() -> None:
    """As many open files as this process may have: the usual 1024 are for programs that use select()."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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


def ended(pid: int) -> bool:
    """All its threads have, or are about to, whether or not its parent has noticed: its memory is no longer its own.

    What a process holds of a device is taken down while it ends, which can take seconds, and only then does its pidfd
    say so. The first thread may have left others behind.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        return not alive(pidfd) or (_leaves(pid, pid) and all(_leaves(pid, thread) for thread in _threads(pid)))
    finally:
        os.close(pidfd)


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _leaves(pid: int, thread: int | str) -> bool:
    """The thread executes nothing of its program's any more."""
    try:
        said = read(f"/proc/{pid}/task/{thread}/stat")
    except OSError:
        return True
    return bool(int(said.rpartition(b")")[2].split()[6]) & _PF_EXITING)


def started(pid: int) -> int | None:
    """When it was, in ticks since boot: with the pid, this is another process's never. None: it has ended."""
    try:
        ticks = int(read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return None
    return None if ended(pid) else ticks


def and_above(path: str) -> Iterator[str]:
    """A cgroup's path and those of all around it."""
    while path.strip("/"):
        yield path
        path = path.rpartition("/")[0]
    yield "/"


def identity(pidfd: int) -> tuple[int, int]:
    """The process of a pidfd, as we call it, and the id of its cgroup. Raises OSError: it is gone."""
    try:
        said = fcntl.ioctl(pidfd, _PIDFD_GET_INFO, _INFO.pack(_INFO_PID_AND_CGROUP, 0, 0, 0))
    except OSError as error:
        if error.errno not in _UNKNOWN_TO_PIDFDS:
            raise
        return _identity_by_name(pidfd)
    _, cgroup, _, tgid = _INFO.unpack(said)
    return tgid, cgroup


def _identity_by_name(pidfd: int) -> tuple[int, int]:
    """What /proc says under its pid: of this process, if it lives on after that."""
    pid, root = _pid_of(pidfd), cgroup2_root()
    for _ in range(_TRIES):
        path = _cgroup(pid)
        with contextlib.suppress(FileNotFoundError):  # it has moved, and the cgroup is gone
            cgroup = os.stat(f"{root}{path}").st_ino
            if path == _cgroup(pid) and alive(pidfd):
                return pid, cgroup
    raise OSError(errno.ESRCH, "it is gone, or never stays in a cgroup")


def _pid_of(pidfd: int) -> int:
    pid = int(_field(read(f"/proc/self/fdinfo/{pidfd}"), b"Pid:") or -1)
    if pid <= 0:
        raise OSError(errno.ESRCH, "it is gone")
    return pid


def pid_space(pidfd: int) -> int:
    """The inode of the pid namespace of a pidfd's process. Raises OSError: it is gone."""
    try:
        space = fcntl.ioctl(pidfd, _PIDFD_GET_PID_NAMESPACE)
    except OSError as error:
        if error.errno not in _UNKNOWN_TO_PIDFDS:
            raise
        ino = os.stat(f"/proc/{_pid_of(pidfd)}/ns/pid").st_ino
        if not alive(pidfd):
            raise OSError(errno.ESRCH, "it is gone") from error
        return ino
    try:
        return os.fstat(space).st_ino
    finally:
        os.close(space)


def pid_names(tgid: int) -> dict[int, int]:
    """What each pid namespace calls a process, its own first: inode of the namespace -> pid. Empty: it is gone."""
    names: dict[int, int] = {}
    try:
        pids = _field(read(f"/proc/{tgid}/status"), b"NSpid:").split()
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


def clock_ahead_ns(pid: int) -> int:
    """By how much a process's CLOCK_MONOTONIC is ahead of ours, in a time namespace of its own; 0: it is gone."""
    try:
        if os.readlink(f"/proc/{pid}/ns/time") == os.readlink("/proc/self/ns/time"):
            return 0
        seconds, ns = _field(read(f"/proc/{pid}/timens_offsets"), b"monotonic").split()
    except (OSError, ValueError):
        return 0
    return int(seconds) * 1_000_000_000 + int(ns)


# -- how it was started ---------------------------------------------------------------------------------------------


def loader(pid: int) -> str:
    """The name of the dynamic loader's file that started a program; empty: none, it is static.

    By what the kernel says alone: no file of the program's own is opened. Raises OSError: it is gone.
    """
    auxv = read(f"/proc/{pid}/auxv")
    base = dict(_AUX.iter_unpack(auxv[: len(auxv) // _AUX.size * _AUX.size])).get(_AT_BASE, 0)
    if not base:  # or the loader itself was called, with the program as an argument
        name = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
        return name if name.startswith("ld-") else ""
    maps = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.fsdecode(mappings.find(maps, base).path.rpartition(b"/")[2])
    finally:
        os.close(maps)


def has_mount(pid: int, place: str) -> bool:
    """Is anything mounted there, as the process sees it? Raises OSError: it is gone."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return any(line.split(" ", 5)[4] == place for line in islice(file, MOST_MOUNTS))


# -- its mappings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapped file, as /proc/PID/maps names it; `place` is one of its mappings, as /proc/PID/map_files does."""

    path: str
    dev: int
    ino: int
    place: str = field(default="", compare=False)

    @classmethod
    def of(cls, found: mappings.Mapped) -> Mapping:
        """The file of one mapping."""
        path = os.fsdecode(found.path.removesuffix(b" (deleted)"))
        return cls(path, found.dev, found.ino, f"{found.start:x}-{found.end:x}")


def fgpu_mappings(pid: int) -> list[Mapping] | None:
    """The libcuda and shim files that a process has mapped executable, each once.

    None: nobody can tell, because it is gone, has no memory of its own or maps absurdly much. The kernel is asked for
    one executable file after the other: the text of all mappings takes five times as long to make and to read.
    """
    try:
        fd = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return list(dict.fromkeys(map(Mapping.of, with_cuda_names(fd))))
    except OSError:
        return None
    finally:
        os.close(fd)


def keeps_books(pid: int) -> bool:
    """Has it mapped the books of an image's own limit? Not where nobody can tell."""
    try:
        fd = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return any(found.path.endswith(BOOKS) for found in mappings.each(fd, mappings.NEXT_SHARED))
    except OSError:
        return False
    finally:
        os.close(fd)


def with_cuda_names(maps: int) -> Iterator[mappings.Mapped]:
    """The executable mappings of libcuda and shim files in an open /proc/PID/maps. Raises OSError."""
    for found in mappings.each(maps, mappings.NEXT_EXECUTABLE):
        if found.path.rpartition(b"/")[2].startswith(CUDA_NAMES):
            yield found


def open_regular(path: str, follow: bool = False) -> int:
    """Opens a file for reading that may have been put there for us to find. OSError: it is not regular.

    It is looked at before it is opened: a fifo would make us wait, a device do whatever it does. No lease is waited
    for. `follow`: the last name may be a link.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(place)


def as_mapped(path: str) -> tuple[int, int]:
    """(dev, ino) of a file as /proc/PID/maps names it: on some overlays stat() says another. Raises OSError."""
    fd = open_regular(path, follow=True)
    try:
        return mapped_as(fd)
    finally:
        os.close(fd)


def mapped_as(fd: int) -> tuple[int, int]:
    """(dev, ino) of an open file as /proc/PID/maps names it. Raises OSError."""
    with a_page_of(fd, 0) as at:
        maps = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = mappings.find(maps, at, named=False)
            return found.dev, found.ino
        finally:
            os.close(maps)


@contextlib.contextmanager
def a_page_of(fd: int, offset: int) -> Iterator[int]:
    """Map one page of an open file, private, at the address that this yields. Raises OSError. It is to be read by
    /proc/self/mem: touching it would kill this process where the file has been cut shorter.
    """
    at = _LIBC.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, offset)
    if at == _MAP_FAILED:
        raise OSError(errno.ENODEV, "cannot be mapped")
    try:
        yield at
    finally:
        _LIBC.munmap(ctypes.c_void_p(at), ctypes.c_size_t(mmap.PAGESIZE))


def has_memory(pid: int) -> bool:
    """Does it live with memory of its own, as neither kernel threads nor the ended do?"""
    try:
        return not read(f"/proc/{pid}/statm").startswith(b"0 ")
    except OSError:
        return False


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
    return os.fsdecode(_field(read(f"/proc/{pid}/cgroup"), b"0::"))


def _folders(root: Path, inside: list[str]) -> list[str]:
    return list(accumulate(filter(None, inside), "{}/{}".format, initial=str(root)))[::-1]
