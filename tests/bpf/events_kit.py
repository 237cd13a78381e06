"""Read and count the kernel's events."""

from __future__ import annotations

from fgpu_ebpf import abi

News = abi.News


def of(events, level, *kinds):
    """Return the events of a level: those of the given kinds, or all except those of new processes."""
    found = [e for e in events.read() if e.cgroup == level.cgroup]
    return [e for e in found if (e.kind in kinds if kinds else e.kind not in (News.PROCESS, News.EXECUTED))]


def fates(kernel):
    counts = {c.reason: n for c, n in kernel.ledger.counters().items() if c.kind == abi.Kind.EVENTS}
    return [counts.get(fate, 0) for fate in abi.Fate]


def reasons(kernel, level):
    return {
        (abi.Kind(c.kind), abi.Reason(c.reason)): n
        for c, n in kernel.ledger.counters().items()
        if c.cgroup == level.cgroup
    }
