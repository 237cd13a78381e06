"""Budgets of each cgroup: the number of its libcuda files that may be probed, and the processor time for this work.

A workload has one budget, with all cgroups inside it (`workloads.bound_owner`). Files beyond the budget are refused, so
processes that map such files get no memory. The host's own files count for no cgroup. This module runs in the agent's
main thread.
"""

from __future__ import annotations

from collections import Counter

from fgpu_ebpf.linux.procmaps import File

MOST_FILES = 128  # of one workload (Bounds.files); each file takes two descriptors and time to detach
MOST_FILES_ALL = 2048
# The processor time that a cgroup can use at once, and the time that is added in each round.
BURST_NS, REFILL_NS = 3_000_000_000, 50_000_000


class FileBudget:
    """The files and the processor time of each cgroup. `most`: the maximum number of files of one cgroup."""

    def __init__(self, most: int = MOST_FILES) -> None:
        self.most = most
        self._cgroups: dict[File, str] = {}
        self._has = Counter[str]()
        self._spent_ns = Counter[str]()

    def __contains__(self, file: File) -> bool:
        """Return whether the file counts for a cgroup."""
        return file in self._cgroups

    def cgroup_of(self, file: File) -> str:
        """Return the cgroup for which the file counts; empty: the file counts for no cgroup."""
        return self._cgroups.get(file, "")

    def room(self, cgroup: str) -> int:
        """Return how many more files of this cgroup may be probed."""
        return max(0, min(self.most - self._has[cgroup], MOST_FILES_ALL - len(self._cgroups)))

    def has(self, cgroup: str) -> tuple[int, int]:
        """Return the number of files of this cgroup, and of all cgroups together."""
        return self._has[cgroup], len(self._cgroups)

    def enter(self, file: File, cgroup: str) -> None:
        """Count the file for this cgroup, unless the file already counts for another cgroup."""
        if file not in self._cgroups:
            self._cgroups[file] = cgroup
            self._has[cgroup] += 1

    def forget(self, file: File) -> None:
        """Stop counting the file."""
        cgroup = self._cgroups.pop(file, None)
        if cgroup is not None:
            self._has[cgroup] -= 1
            self._has += Counter()  # drops cgroups without files

    def charge(self, cgroup: str, took_ns: int) -> None:
        """Charge this cgroup for processor time of work, in nanoseconds."""
        self._spent_ns[cgroup] += took_ns

    def has_time(self, cgroup: str) -> bool:
        """Return whether the cgroup has processor time left."""
        return self._spent_ns[cgroup] <= BURST_NS

    def refill(self) -> None:
        """Refill the processor time of all cgroups. The caller calls this method in every round, once a second."""
        self._spent_ns = Counter({w: ns - REFILL_NS for w, ns in self._spent_ns.items() if ns > REFILL_NS})
