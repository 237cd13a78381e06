"""Facts about a process from /proc and the cgroup file system: its state, namespaces, mappings and cgroups.

This module runs in all threads of the agent, the gatekeeper and the commands. Reads of files whose length a process
determines have a maximum. Facts come from the kernel, never from the process itself. If the process has exited, the
result is None or empty, unless the docstring of a function names OSError for this case.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import select
import struct
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.linux import procmaps

MOST_MOUNTS = 1 << 14
DEEPEST = 32  # a deeper cgroup counts as its ancestor at this depth; the BPF programs walk 16 levels
NS_GET_PARENT = 0xB702

_AUX, _AUX_32_BIT = struct.Struct("2Q"), struct.Struct("2I")  # entries of the auxiliary vector: type and value
_AT_PAGESZ, _AT_BASE = 6, 7
_PIDFD_GET_PID_NAMESPACE = 0xFF05  # Linux 6.11
_PIDFD_GET_INFO, _INFO = 0xC040FF0B, struct.Struct("QQII40x")  # Linux 6.13: struct pidfd_info
_INFO_PID_AND_CGROUP = 0b101
_UNKNOWN_TO_PIDFDS = (errno.ENOTTY, errno.EINVAL)
_TRIES = 10
# Errors of a host that is short of memory or files. EFAULT means that the kernel had no page for a result (cgroup v1).
SHORTAGES = frozenset({errno.ENOMEM, errno.EAGAIN, errno.ENFILE, errno.EMFILE, errno.ENOBUFS, errno.EFAULT})
_PF_EXITING = 0x4  # a flag of a task, set before the kernel reports the exit


class Mounted(NamedTuple):
    """A mount in /proc/PID/mountinfo, with escapes as in that file.

    `device`: MAJOR:MINOR of the mounted file system. `source`: the path of the mounted folder or file in that file
    system. `kind` and `options`: the file system's.
    """

    device: str
    source: str
    path: str
    kind: str
    options: str


def read(path: str, most: int = 1 << 16) -> bytes:
    """Return the first `most` bytes of a file of /proc or of the cgroup file system. Raise OSError on failure.

    One read() of a file with many lines returns at most a page, even if more fits.
    """
    parts, left = list[bytes](), most
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while left and (part := os.read(fd, min(left, 1 << 16))):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def field(text: bytes, name: bytes) -> bytes:
    """Return the rest of the first line that begins with a name, or an empty text if there is no such line."""
    return next((line[len(name) :] for line in text.split(b"\n") if line.startswith(name)), b"")


# -- identity and end ------------------------------------------------------------------------------------------------


def pids() -> list[int]:
    """Return the pids of all processes, without threads."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def alive(pidfd: int) -> bool:
    """Return whether the process of this pidfd has not ended yet."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def ended(pid: int) -> bool:
    """Return whether all threads of a process have ended or are exiting, even without a wait by the parent.

    The kernel frees the device memory of a process during its exit. The release can take seconds, and the pidfd reports
    the exit only afterwards. All threads are checked, because the first thread may exit before the other threads. In a
    shortage of memory or files, an end that cannot be confirmed counts as no end.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        return error.errno not in SHORTAGES
    try:
        return not alive(pidfd) or _are_exiting(pid)
    finally:
        os.close(pidfd)


def exiting(pid: int) -> bool:
    """Return whether all threads of a process are exiting, while the kernel still releases the process's resources."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        return alive(pidfd) and _are_exiting(pid)
    finally:
        os.close(pidfd)


def _are_exiting(pid: int) -> bool:
    if not is_exiting(pid, pid):
        return False
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError as error:
        return error.errno not in SHORTAGES
    return all(is_exiting(pid, thread) for thread in threads)


def is_exiting(pid: int, thread: int | str) -> bool:
    """Return whether a thread is exiting or has ended, so that the thread runs no more code of its program.

    The result is False in a shortage of memory or files.
    """
    try:
        text = read(f"/proc/{pid}/task/{thread}/stat")
    except OSError as error:
        return error.errno not in SHORTAGES
    return bool(int(text.rpartition(b")")[2].split()[6]) & _PF_EXITING)


def started(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None: the process has ended.

    The pid and the start time together identify a process. Raise OSError in a shortage of memory or files.
    """
    try:
        ticks = int(read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[19])
    except IndexError:
        return None
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        return None
    return None if ended(pid) else ticks


def and_above(path: str) -> Iterator[str]:
    """Yield the path of a cgroup and of all enclosing cgroups, innermost first."""
    while path.strip("/"):
        yield path
        path = path.rpartition("/")[0]
    yield "/"


def identity(pidfd: int) -> tuple[int, int]:
    """Return a process's pid in the caller's pid namespace, and the id of its cgroup.

    Raise OSError if the process has exited.
    """
    try:
        info = fcntl.ioctl(pidfd, _PIDFD_GET_INFO, _INFO.pack(_INFO_PID_AND_CGROUP, 0, 0, 0))
    except OSError as error:
        if error.errno not in _UNKNOWN_TO_PIDFDS:
            raise
        return _identity_by_name(pidfd)
    _, cgroup, _, tgid = _INFO.unpack(info)
    return tgid, cgroup


def _identity_by_name(pidfd: int) -> tuple[int, int]:
    """Return identity() from /proc, for kernels before 6.13.

    The values belong to the process only if the process is still alive after the reading.
    """
    pid, root = _pid_of(pidfd), cgroup2_root()
    for _ in range(_TRIES):
        path = _cgroup(pid)
        with contextlib.suppress(FileNotFoundError):  # the process has moved, and the old cgroup was removed
            cgroup = os.stat(f"{root}{path}").st_ino
            if path == _cgroup(pid) and alive(pidfd):
                return pid, cgroup
    raise OSError(errno.ESRCH, "the process has exited, or changes its cgroup too often")


def _pid_of(pidfd: int) -> int:
    pid = int(field(read(f"/proc/self/fdinfo/{pidfd}"), b"Pid:") or -1)
    if pid <= 0:
        raise OSError(errno.ESRCH, "the process has exited")
    return pid


def pid_space(pidfd: int) -> int:
    """Return the inode of the pid namespace of a pidfd's process. Raise OSError if the process has exited."""
    try:
        space = fcntl.ioctl(pidfd, _PIDFD_GET_PID_NAMESPACE)
    except OSError as error:
        if error.errno not in _UNKNOWN_TO_PIDFDS:
            raise
        ino = os.stat(f"/proc/{_pid_of(pidfd)}/ns/pid").st_ino
        if not alive(pidfd):
            raise OSError(errno.ESRCH, "the process has exited") from error
        return ino
    try:
        return os.fstat(space).st_ino
    finally:
        os.close(space)


def pid_names(tgid: int) -> dict[int, int]:
    """Return the pids of a process by the inodes of its pid namespaces, innermost first; empty after its exit."""
    names: dict[int, int] = {}
    try:
        pids = field(read(f"/proc/{tgid}/status"), b"NSpid:").split()
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
    """Return how many ns a process's CLOCK_MONOTONIC is ahead of the caller's, by its time namespace.

    The result is 0 if the process has exited.
    """
    try:
        if os.readlink(f"/proc/{pid}/ns/time") == os.readlink("/proc/self/ns/time"):
            return 0
        seconds, ns = field(read(f"/proc/{pid}/timens_offsets"), b"monotonic").split()
    except (OSError, ValueError):
        return 0
    return int(seconds) * 1_000_000_000 + int(ns)


# -- start of the program --------------------------------------------------------------------------------------------


def _auxv(pid: int, entry: struct.Struct) -> dict[int, int]:
    """Return the auxiliary vector of a program (type -> value), decoded with this entry format.

    Raise OSError on failure.
    """
    text = read(f"/proc/{pid}/auxv")
    return dict(entry.iter_unpack(text[: len(text) // entry.size * entry.size]))


def is_32_bit(pid: int) -> bool:
    """Return whether a process runs a 32-bit program of any architecture. Raise OSError if the process has exited."""
    return bool(_auxv(pid, _AUX_32_BIT).get(_AT_PAGESZ))  # in a 64-bit vector, the upper half of each type is 0


def loader(pid: int) -> str:
    """Return the path of the dynamic loader of a 64-bit program, relative to the root of the process.

    The path comes from the kernel. No file of the program is opened. The result is empty if the program is static.
    Raise OSError if the process has exited.
    """
    base, path = _auxv(pid, _AUX).get(_AT_BASE, 0), os.readlink(f"/proc/{pid}/exe")
    if base:
        with procmaps.opened(pid) as maps:
            path = os.fsdecode(procmaps.find(maps, base).path)
    elif not os.path.basename(path).startswith("ld-"):  # otherwise the loader was executed with the program as argument
        return ""
    return path.removeprefix(os.readlink(f"/proc/{pid}/root").rstrip("/"))


def has_mount(pid: int, path: str) -> bool:
    """Return whether a path is a mount point in a process's mount namespace. Raise OSError if the process is gone."""
    return any(mount.path == path for mount in islice(mounts(pid), MOST_MOUNTS))


def mounts(pid: int | str = "self") -> Iterator[Mounted]:
    """Yield the mounts in a process's mount namespace. Raise OSError if the process is gone.

    The kernel escapes spaces and line feeds in paths, but no other line end or white space of Unicode. Therefore only
    a space ends a field, and only a line feed ends a line.
    """
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            _, _, device, source, path, _, *more = line.rstrip("\n").split(" ")
            yield Mounted(device, source, path, kind=more[more.index("-") + 1], options=more[-1])


def has_memory(pid: int) -> bool:
    """Return whether a process has an address space. Kernel threads and ended processes have no address space."""
    try:
        return not read(f"/proc/{pid}/statm").startswith(b"0 ")
    except OSError:
        return False


# -- cgroups ---------------------------------------------------------------------------------------------------------


def cgroup2_root() -> Path | None:
    """Return the mount point of the cgroup v2 hierarchy, or None."""
    return next((Path(mount.path) for mount in mounts() if mount.kind == "cgroup2"), None)


def cgroup_path(pid: int) -> str | None:
    """Return the path of a process's v2 cgroup below the hierarchy's root, e.g. `/fgpu/run-1`, or None."""
    try:
        return _cgroup(pid).removesuffix(" (deleted)") or None
    except OSError:
        return None


def is_outside(path: str) -> bool:
    """Return whether a cgroup lies outside this process's cgroup namespace, where no path can name the cgroup."""
    return path.startswith("/..")


def cgroup_ids(root: Path, path: str) -> Iterator[int]:
    """Yield the ids of a cgroup and its ancestors, innermost first, the root last. Removed cgroups are left out."""
    for folder in _folders(root, path.split("/")):
        try:
            yield os.stat(folder).st_ino
        except OSError:
            continue


def cgroups(pid: int, root: Path) -> list[int]:
    """Return the ids of a process's cgroup and its ancestors, innermost first.

    The result is empty if the cgroup lies outside this process's cgroup namespace. Raise OSError if the process has
    exited, or its cgroup was removed.
    """
    inside = _cgroup(pid).removeprefix("/").split("/")[:DEEPEST]
    if ".." in inside:  # outside this process's cgroup namespace
        return []
    return [os.stat(folder).st_ino for folder in _folders(root, inside)]


def _cgroup(pid: int) -> str:
    return os.fsdecode(field(read(f"/proc/{pid}/cgroup"), b"0::"))


def _folders(root: Path, inside: list[str]) -> list[str]:
    return list(accumulate(filter(None, inside), "{}/{}".format, initial=str(root)))[::-1]


@functools.cache
def possible_processors() -> int:
    """Return the number of possible processors, which is the number of values per entry of a per-processor map."""
    spans = [span.split("-") for span in Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")]
    return 1 + max(int(span[-1]) for span in spans)
