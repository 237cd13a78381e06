"""A test double of the ledger."""

from __future__ import annotations

from types import SimpleNamespace

from fgpu_ebpf.ledger.resolutions import Resolution

CONTEXT_BYTES = 500 << 20


class Books:
    """A ledger with the calls that an enforcer makes. It records what it is given."""

    def __init__(self):
        self.limits, self.shares, self.decided, self.calls = {}, {}, {}, 0
        self.epoch, self.uncommitted, self.used, self.outside = 0, {}, {}, {}
        self.known, self.so_far, self.moved, self.over = {}, 0, [], []

    def context_bytes(self, _):
        return CONTEXT_BYTES

    def page_missing(self, cgroup):
        return cgroup not in self.limits

    def set_limits(self, levels, over=None):
        self.calls += 1
        levels = list(levels)
        new = {level.cgroup for level in levels} - {*self.limits}
        self.over += [lambda: over(new)] if new and over else []
        self.limits |= {level.cgroup: (dict(level.bytes), level.flags) for level in levels}
        self.uncommitted |= {level.cgroup: set(level.uncommitted) for level in levels}
        self.outside |= {level.cgroup: dict(level.outside) for level in levels}

    def usage(self, cgroup, devices):
        return [SimpleNamespace(used=self.used.get((cgroup, device), 0), parked=0) for device in devices]

    def remove(self, cgroups):
        for cgroup in cgroups:
            self.limits.pop(cgroup, None)
            self.decided.pop(cgroup, None)

    @property
    def times(self):
        return self

    def set_shares(self, shares):
        self.shares |= shares

    def resolve(self, cgroup, managed):
        self.decided[cgroup] = managed

    def refuse(self, cgroup):
        self.decided[cgroup] = None

    def resolution(self, cgroup):
        names = {True: Resolution.MANAGED, False: Resolution.UNMANAGED, None: Resolution.REFUSED}
        return names[self.decided[cgroup]] if cgroup in self.decided else None

    def unresolve(self, cgroups):
        for cgroup in cgroups:
            self.decided.pop(cgroup, None)

    def not_managed(self):
        return [cgroup for cgroup, managed in self.decided.items() if not managed]

    def forget(self, cgroup):
        self.decided.pop(cgroup, None)

    def resolved(self, cgroup):
        return self.decided.get(cgroup)

    def new_epoch(self):
        self.epoch += 1

    def processes(self):
        return self.known

    def processes_so_far(self):
        return self.so_far

    def move(self, pid, generation, levels):
        self.moved.append((pid, generation, levels))


class PinnedBooks:
    """A ledger with the methods that take_up() calls. `books` has the methods that an enforcer calls."""

    def __init__(self, books):
        self.books = books

    def __getattr__(self, name):
        return getattr(self.books, name)

    def limits(self):
        for cgroup, (bytes_, flags) in self.books.limits.items():
            yield from ((cgroup, device, limit, flags) for device, limit in bytes_.items())

    def tenants(self):
        return list(self.books.limits)

    def usage(self, _cgroup):
        return []

    @property
    def times(self):
        return SimpleNamespace(shares=lambda: {(c, d): s for c, by in self.books.shares.items() for d, s in by.items()})
