"""How many files of libcuda each cgroup may have probed, and how much of the processor looking at them may take.

A workload counts as one, with all cgroups inside it (`bound_owner`). What is beyond is refused, which means that its
processes get no memory; files of the host's own count for no cgroup.
"""

from __future__ import annotations

from collections import Counter

from fgpu_ebpf.mappings import File

MOST_FILES = 128  # of one workload (Bounds.files): each takes two descriptors, and time to end
MOST_FILES_ALL = 2048
BURST_NS, REFILL_NS = 3_000_000_000, 50_000_000  # of a cgroup: what it may take at once, and after that in each round


class FileBudget:
    """What each cgroup has and has taken. `most`: files of one cgroup."""

    def __init__(self, most: int = MOST_FILES) -> None:
        self.most = most
        self._cgroups: dict[File, str] = {}
        self._has = Counter[str]()
        self._spent_ns = Counter[str]()

    def __contains__(self, file: File) -> bool:
        """Whether it is counted."""
        return file in self._cgroups

    def cgroup_of(self, file: File) -> str:
        """The cgroup that it counts for; empty: none."""
        return self._cgroups.get(file, "")

    def room(self, cgroup: str) -> int:
        """How many more files of this cgroup may be probed."""
        return max(0, min(self.most - self._has[cgroup], MOST_FILES_ALL - len(self._cgroups)))

    def has(self, cgroup: str) -> tuple[int, int]:
        """How many files the cgroup has, and all have."""
        return self._has[cgroup], len(self._cgroups)

    def enter(self, file: File, cgroup: str) -> None:
        """The file counts for this cgroup, unless it does for another."""
        if file not in self._cgroups:
            self._cgroups[file] = cgroup
            self._has[cgroup] += 1

    def forget(self, file: File) -> None:
        """The file counts no more."""
        cgroup = self._cgroups.pop(file, None)
        if cgroup is not None:
            self._has[cgroup] -= 1
            self._has += Counter()  # without those that have nothing left

    def charge(self, cgroup: str, took_ns: int) -> None:
        """Work for this cgroup took so much of the processor."""
        self._spent_ns[cgroup] += took_ns

    def has_time(self, cgroup: str) -> bool:
        """Whether more work may be done for it."""
        return self._spent_ns[cgroup] <= BURST_NS

    def forgive(self) -> None:
        """To be called in every round, once a second."""
        self._spent_ns = Counter({w: ns - REFILL_NS for w, ns in self._spent_ns.items() if ns > REFILL_NS})
