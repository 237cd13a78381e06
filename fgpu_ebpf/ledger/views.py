"""The ledger's sections of a Snapshot: counters and tables by their names in metrics.

This module runs in the agent's main thread. Errors are OSError of bpf(2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

from fgpu_ebpf import abi
from fgpu_ebpf.ledger import resolutions
from fgpu_ebpf.ledger.ledger import Count, Ledger
from fgpu_ebpf.linux import bpf
from fgpu_ebpf.snapshot import MapView, Refusal


def probe_hits(ledger: Ledger) -> Mapping[str, int]:
    """Return the number of hits by the probe's name, for every probed driver function and the shim's symbols."""
    counted = ledger.hits()
    named = {f.name.lower(): counted[f] for f in abi.Function if f is not abi.Function.NONE}
    return named | {"admit": counted[abi.HIT_ADMIT], "give_back": counted[abi.HIT_GIVE_BACK]}


def refusals(counters: Mapping[Count, int]) -> Mapping[tuple[int, int], Sequence[Refusal]]:
    """Return the refusals by level and device."""
    found: dict[tuple[int, int], list[Refusal]] = defaultdict(list)
    for c, n in counters.items():
        if c.cgroup:
            refusal = Refusal(abi.Kind(c.kind).name.lower(), abi.Reason(c.reason).name.lower(), n)
            found[c.cgroup, c.device].append(refusal)
    return found


def anomalies(counters: Mapping[Count, int]) -> dict[str, int]:
    """Return the number of occurrences on the host by the anomaly's name."""
    return _of_host(counters, abi.Kind.KINDS, abi.Anomaly)


def events(counters: Mapping[Count, int]) -> dict[str, int]:
    """Return the number of events on the host by their fate: sent, or the reason for which they were lost."""
    return _of_host(counters, abi.Kind.EVENTS, abi.Fate)


def _of_host(counters: Mapping[Count, int], kind: int, reasons: Iterable[IntEnum]) -> dict[str, int]:
    return {
        reason.name.lower(): sum(n for c, n in counters.items() if (c.cgroup, c.kind, c.reason) == (0, kind, reason))
        for reason in reasons
    }


def tables(ledger: Ledger) -> tuple[MapView, ...]:
    """Return the number of entries and the size of each table that all tenants share.

    For a table that is divided among bound owners, the number is the number of claimed entries, which are in use or
    reserved for a workload. Such tables are large, so their entries are not counted one by one.
    """
    claimed = zip(ledger.owners.sizes.items(), ledger.owners.claimed(), strict=False)
    return (
        MapView("levels", ledger.levels_taken(), bpf.MOST_INNER),
        MapView("resolved", ledger.resolutions.count(), resolutions.MOST),
        *(MapView(name, entries, most) for (name, most), entries in claimed),
    )
