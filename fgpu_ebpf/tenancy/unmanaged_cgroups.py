"""Unmanaged and refused cgroups in the kernel's map `resolved`, which has decisions about registered programs' cgroups.

Each bound owner has a maximum of entries. If programs of one owner register from more cgroups, the oldest entry of the
owner is removed, and the agent decides again when the next program of that cgroup registers. Programs of unmanaged
cgroups therefore cannot use up the entries for managed cgroups. The module runs in the agent's main loop. Writes to the
kernel's map raise OSError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.resolutions import Resolution
from fgpu_ebpf.workloads.bound_owner import Owner
from fgpu_ebpf.workloads.cgroups import Workloads
from fgpu_ebpf.workloads.workload import Workload


class UnmanagedCgroups:
    """The cgroups with a decision, including the refused cgroups. `most`: the maximum number for each owner."""

    def __init__(self, ledger: Ledger, most: int) -> None:
        self._ledger, self._most = ledger, most
        self._owners: dict[int, dict[int, None]] = {}  # cgroups by owner, from the oldest decision on
        self._refused: dict[str, int] = {}  # cgroup by path
        self._earlier: set[int] = set()  # cgroups without a limit, by a decision of an earlier agent
        self._searched: set[int] = set()  # cgroups searched by refuse_unmanaged() since the last decision

    def forget_earlier(self) -> None:
        """Remove decisions of an earlier agent, which have no owner.

        This agent decides again when the next program of one of these cgroups registers.
        """
        for cgroup in list(self._ledger.not_managed()):
            if self._ledger.resolved(cgroup) is False:
                self._earlier.add(cgroup)
            self._ledger.forget(cgroup)

    def kept_free(self, workload: Workload, workloads: Workloads) -> list[str]:
        """Return a pod's cgroups that an earlier agent has left without a limit, while the pod's claims are unknown."""
        if not self._earlier or not workload.booking or not workload.booking.unknown:
            return []
        around = (workload.path, *workloads.walk(workload.path))
        return [path for path in around if workloads.cgroup(path) in self._earlier]

    def unmanaged(self, owner: int, cgroup: int) -> None:
        """Write the decision that programs in this cgroup have no limit.

        Raise OSError if the kernel refuses the write.
        """
        self._searched.clear()
        self._ledger.resolve(cgroup, False)
        self._enter(owner, cgroup)

    def refuse(self, owner: int, cgroup: int, path: str) -> None:
        """Write the decision that programs in and below this cgroup get no memory.

        Raise OSError if the kernel refuses the write.
        """
        self._ledger.refuse(cgroup)
        self._refused[path] = cgroup
        self._enter(owner, cgroup)

    def refuse_unmanaged(self, lacking: Mapping[str, int], workloads: Workloads, owner: Callable[[str], Owner]) -> None:
        """Refuse the cgroups without room for a limit in which programs run without a limit, by an earlier decision.

        These programs register again. A program without a decision is reported by the gatekeeper, and is refused then.
        Each cgroup is searched once until a program gets a decision, because a search reads all cgroups inside.

        Args:
            lacking: the cgroups that should have a limit and for which the kernel has no free slot, by path.
            workloads: the cgroups of the host.
            owner: returns the bound owner of a cgroup.

        Raises:
            OSError: the kernel refuses a write.
        """
        for path, cgroup in lacking.items():
            if cgroup in self._searched or self._refused.get(path) == cgroup:
                continue
            inside = {c for c in map(workloads.cgroup, (path, *workloads.walk(path))) if c and self._is_free(c)}
            if inside:
                self.refuse(owner(path).cgroup, cgroup, path)
                self._earlier -= inside
                for decided in inside - {cgroup}:
                    self._ledger.forget(decided)
                self._ledger.new_epoch()
            self._searched.add(cgroup)

    def _is_free(self, cgroup: int) -> bool:
        found = self._ledger.resolution(cgroup)
        return found is Resolution.UNMANAGED or (found is None and cgroup in self._earlier)

    def _enter(self, owner: int, cgroup: int) -> None:
        known = self._owners.setdefault(owner, {})
        known.pop(cgroup, None)
        known[cgroup] = None
        if len(known) > self._most:
            oldest = next(iter(known))
            del known[oldest]
            self._ledger.forget(oldest)
            self._refused = {path: cgroup for path, cgroup in self._refused.items() if cgroup != oldest}

    @property
    def refused(self) -> list[str]:
        """The paths of the refused cgroups."""
        return list(self._refused)

    def admit(self, path: str, is_gone: bool) -> None:
        """Remove the refusal of a cgroup, so that its programs retry. `is_gone`: the cgroup no longer exists."""
        cgroup = self._refused.pop(path)
        if is_gone:
            self._ledger.forget(cgroup)
        else:
            self._ledger.unresolve([cgroup])

    def known(self) -> Set[int]:
        """Return the ids of the cgroups with a decision that are not managed."""
        return set(self._ledger.not_managed())

    def forget_gone(self, before: Set[int], live: Set[int | None]) -> None:
        """Remove the cgroups that a scan of the host has not found.

        Args:
            before: known() before the scan. Later cgroups stay, because the scan may have missed later cgroups.
            live: the cgroups that the scan has found.
        """
        self.keep_only({cgroup for cgroup in live if cgroup is not None} | (self.known() - before))

    def keep_only(self, live: Set[int]) -> None:
        """Remove all cgroups that are not in `live` and therefore no longer exist."""
        for cgroup in set(self._ledger.not_managed()) - live:
            self._ledger.forget(cgroup)
        left = {owner: {c: None for c in known if c in live} for owner, known in self._owners.items()}
        self._owners = {owner: known for owner, known in left.items() if known}
        self._refused = {path: cgroup for path, cgroup in self._refused.items() if cgroup in live}
        self._searched &= live
