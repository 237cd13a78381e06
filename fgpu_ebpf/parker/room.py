"""Check that the host and every memory cgroup of the processes have room for the copy of the device memory.

The kernel charges the copy to the memory cgroup of the process, and kills a process of the cgroup if the cgroup is
full. The kernel reclaims pages of files that were not used recently, so such pages count as room.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.linux import procfs
from fgpu_ebpf.parker.processes import cgroups
from fgpu_ebpf.parker.protocol import RequestError

MARGIN = 0.12  # measured: 8 GiB on the device took 8.9 GiB of the cgroup
_UNLIMITED = 1 << 60  # version 1 shows no limit as a number near 2^63
_GIB = 1 << 30

# The limits, the use, and the statistics of file pages, in both versions.
_VERSIONS = (
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)


class Copy(NamedTuple):
    """The copy of the device memory of a job's processes. `size`: bytes of device memory."""

    pids: Sequence[int]
    size: int


def check(copy: Copy, others: Iterable[Copy] = ()) -> None:
    """Check that a copy and a margin fit in each memory cgroup and in the host. Raise RequestError on failure.

    `others`: copies that began before and may not be complete. Bytes that these copies have copied already count twice.
    """
    around = [(other.size, _folders_of_some(other.pids)) for other in others]
    for path, folder in dict.fromkeys(found for pid in copy.pids for found in cgroups(pid, "memory")):
        needed = copy.size + sum(size for size, folders in around if folder in folders)
        _check_cgroup(path, folder, int(needed * (1 + MARGIN)))
    needed, available = int((copy.size + sum(size for size, _ in around)) * (1 + MARGIN)), _available()
    if available < needed:
        raise RequestError(f"the host has {_gib(available)} of memory available, and the copy may need {_gib(needed)}")


def _folders_of_some(pids: Iterable[int]) -> set[Path]:
    """Return the cgroups of the processes that have not exited."""
    found: set[Path] = set()
    for pid in pids:
        with contextlib.suppress(RequestError):
            found.update(folder for _, folder in cgroups(pid, "memory"))
    return found


def _check_cgroup(path: str, folder: Path, needed: int) -> None:
    for limits, usage, files in _VERSIONS:
        used = _number(folder / usage)
        for name in limits:
            limit = _number(folder / name)
            if used is None or limit is None or limit >= _UNLIMITED:
                continue
            room = max(0, limit - used + _statistic(folder / "memory.stat", files))
            if room < needed:
                what = f"the cgroup {path} has room for {_gib(room)} ({name} is {_gib(limit)})"
                raise RequestError(f"{what}, and the copy may need {_gib(needed)}")


def _number(path: Path) -> int | None:
    """Return the number in a file; None: the file does not exist, or contains `max`.

    Raise RequestError in a shortage of files or memory, because then a file that cannot be read may have a limit.
    """
    try:
        return int(path.read_text(encoding="ascii"))
    except OSError as error:
        if error.errno in procfs.SHORTAGES:
            raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:
        pass
    return None


def _statistic(path: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def _available() -> int:
    for line in procfs.read("/proc/meminfo").decode("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
