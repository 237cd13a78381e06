"""Cgroups that are not managed and from which programs have asked: which of them the kernel's map keeps.

Each owner of bounds has a number of entries. If it asks from more cgroups, the entry answered longest ago is removed,
and the next program there asks again. So programs of unmanaged cgroups take no entry from managed ones. The enforcer
and the manager use this module, in the agent's main loop. OSError of the kernel's map.
"""

from __future__ import annotations

from collections.abc import Set

from fgpu_ebpf.ledger.ledger import Ledger


class UnmanagedCgroups:
    """The answered cgroups, and which of them are refused. `most`: entries of one owner."""

    def __init__(self, ledger: Ledger, most: int) -> None:
        self._ledger, self._most = ledger, most
        self._owners: dict[int, dict[int, None]] = {}  # cgroups by owner, oldest answer first
        self._refused: dict[str, int] = {}  # cgroup by path

    def forget_earlier(self) -> None:
        """Remove answers of an earlier agent, which have no owner: their programs ask again."""
        for cgroup in list(self._ledger.not_managed()):
            self._ledger.forget(cgroup)

    def unmanaged(self, owner: int, cgroup: int) -> None:
        """Answer that programs in this cgroup have no limit. Raises OSError."""
        self._ledger.resolve(cgroup, False)
        self._enter(owner, cgroup)

    def refuse(self, owner: int, cgroup: int, path: str) -> None:
        """Answer that programs in and below this cgroup get no memory. Raises OSError."""
        self._ledger.refuse(cgroup)
        self._refused[path] = cgroup
        self._enter(owner, cgroup)

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
        """Paths of cgroups that are refused."""
        return list(self._refused)

    def admit(self, path: str, is_gone: bool) -> None:
        """Stop refusing a cgroup, so that its programs retry. `is_gone`: the cgroup no longer exists."""
        cgroup = self._refused.pop(path)
        if is_gone:
            self._ledger.forget(cgroup)
        else:
            self._ledger.unresolve([cgroup])

    def known(self) -> Set[int]:
        """Return the cgroups that were answered and are not managed."""
        return set(self._ledger.not_managed())

    def forget_gone(self, before: Set[int], live: Set[int | None]) -> None:
        """Remove cgroups that were known before a scan of the host and were not found by it."""
        self.keep_only({cgroup for cgroup in live if cgroup is not None} | (self.known() - before))

    def keep_only(self, live: Set[int]) -> None:
        """Remove all other cgroups, since they are gone."""
        for cgroup in set(self._ledger.not_managed()) - live:
            self._ledger.forget(cgroup)
        left = {owner: {c: None for c in known if c in live} for owner, known in self._owners.items()}
        self._owners = {owner: known for owner, known in left.items() if known}
        self._refused = {path: cgroup for path, cgroup in self._refused.items() if cgroup in live}
