"""Cgroups that are not managed and from which programs have asked: how many of them the kernel's map keeps.

Each owner of bounds has so many entries: where it asks from more cgroups, the one that was answered longest ago is
forgotten, and its next program asks anew. So programs that are not managed take no entry from those that are.

Owns: the order in which they were answered, and which of them are refused. Never: decides. On failure: OSError of the
kernel's map.
"""

from __future__ import annotations

from collections.abc import Set

from fgpu_ebpf.ledger import Ledger


class Answered:
    """`most`: entries of one owner."""

    def __init__(self, ledger: Ledger, most: int) -> None:
        self._ledger, self._most = ledger, most
        self._owners: dict[int, dict[int, None]] = {}  # by owner, the oldest first
        self._refused: dict[str, int] = {}  # by path

    def forget_earlier(self) -> None:
        """What an agent before this one has answered has no owner: its programs ask anew."""
        for cgroup in list(self._ledger.not_managed()):
            self._ledger.forget(cgroup)

    def unmanaged(self, owner: int, cgroup: int) -> None:
        """Programs in this cgroup are not held. Raises OSError."""
        self._ledger.resolve(cgroup, False)
        self._enter(owner, cgroup)

    def refuse(self, owner: int, cgroup: int, path: str) -> None:
        """Programs in this cgroup and inside it get no memory. Raises OSError."""
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
        """The cgroup there is refused no longer: its programs ask anew, if there are any."""
        cgroup = self._refused.pop(path)
        if is_gone:
            self._ledger.forget(cgroup)
        else:
            self._ledger.unresolve([cgroup])

    def keep_only(self, live: Set[int]) -> None:
        """Cgroups that are gone are forgotten."""
        for cgroup in set(self._ledger.not_managed()) - live:
            self._ledger.forget(cgroup)
        left = {owner: {c: None for c in known if c in live} for owner, known in self._owners.items()}
        self._owners = {owner: known for owner, known in left.items() if known}
        self._refused = {path: cgroup for path, cgroup in self._refused.items() if cgroup in live}
